// Rows of heads turned by their tokens' angles.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/rotation.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// Rows of a tensor, as they are or turned.
template <typename T>
struct Rows {
  const T* at;
  int64_t stride;
};

// Rows from `begin` to `end` of a head, turned into `buffer` if they are to be.
template <typename T>
Rows<T> turned(Rows<T> rows, const AttentionRotation& rotation, int64_t begin, int64_t end, int64_t head_dim, T* buffer) {
  rows.at += begin * rows.stride;
  if (rotation.cos == nullptr) return rows;
  for (int64_t n = begin; n < end; ++n)
    turn_row(rows.at + (n - begin) * rows.stride, rotation.cos + n * rotation.cos_stride, rotation.sin + n * rotation.sin_stride,
             rotation.interleaved, head_dim, 1.0f, buffer + (n - begin) * head_dim);
  return {buffer, head_dim};
}

// A row of gradients by what was turned becomes one by what it was turned from.
inline void turn_back(float* row, const AttentionRotation& rotation, int64_t token, int64_t head_dim) {
  turn_row(row, rotation.cos + token * rotation.cos_stride, rotation.sin + token * rotation.sin_stride, rotation.interleaved, head_dim,
           -1.0f, row);
}

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
