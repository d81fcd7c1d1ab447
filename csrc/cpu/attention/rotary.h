// Rows of heads turned by their tokens' angles: pairs of channels (a, b) become (a cos - b sin, b cos + a sin), in float32.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/vec.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// `to` may be `from`. A direction of -1 turns back.
template <typename From, typename To>
void turn_row(const From* from, const float* cos, const float* sin, bool interleaved, int64_t head_dim, float direction, To* to) {
  const int64_t half = head_dim / 2;
  if (interleaved) {
    for (int64_t i = 0; i < half; i += Vec::width) {
      const int n = int(half - i < Vec::width ? half - i : Vec::width);
      float x[2 * Vec::width];
      const int first = 2 * n < Vec::width ? 2 * n : Vec::width, second = 2 * n - first;
      store(x, load_n(from + 2 * i, first));
      store(x + Vec::width, second > 0 ? load_n(from + 2 * i + Vec::width, second) : set1(0.0f));
      for (int j = 0; j < n; ++j) {
        const float a = x[2 * j], b = x[2 * j + 1], c = cos[i + j], s = sin[i + j] * direction;
        x[2 * j] = a * c - b * s, x[2 * j + 1] = b * c + a * s;
      }
      store_n(to + 2 * i, load(x), first);
      if (second > 0) store_n(to + 2 * i + Vec::width, load(x + Vec::width), second);
    }
    return;
  }
  for (int64_t i = 0; i < half; i += Vec::width) {
    const int n = int(half - i < Vec::width ? half - i : Vec::width);
    const Vec a = load_n(from + i, n), b = load_n(from + half + i, n), c = load_n(cos + i, n), s = load_n(sin + i, n) * set1(direction);
    store_n(to + i, a * c - b * s, n);
    store_n(to + half + i, b * c + a * s, n);
  }
}

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
