// How attention pooling reads the slots of its windows: in place, pad embeddings added, zeros beyond the grid.
#pragma once

#include "cpu/attention_pool/attention_pool.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greatest(int64_t a, int64_t b) { return a < b ? b : a; }

// One hidden state's part of a slot, from some channel on.
template <typename T>
struct Slot {
  const T* x;    // null: zeros
  const T* pad;  // null: nothing is added
};

template <typename T>
inline Slot<T> slot_at(const PoolWindows& p, int64_t window, int64_t j, int64_t layer, int64_t channel) {
  const PoolSlot& s = p.slots[window * p.size + j];
  if (s.patch < 0) return {nullptr, nullptr};
  const PoolFeature& f = p.features[layer];
  const T* pad = nullptr;
  if (s.pad > 0) pad = static_cast<const T*>(p.pad_embed) + ((s.pad - 1) * p.layers + layer) * p.channels + channel;
  return {static_cast<const T*>(f.data) + s.tile * f.tile_stride + s.patch * f.patch_stride + channel, pad};
}

// Channels c.. of a slot, at most a vector of `n`, rounded as the sum of patch and pad embedding is.
template <typename T>
inline Vec slot_values(const Slot<T>& slot, int64_t c, int64_t n) {
  if (slot.x == nullptr || n <= 0) return set1(0.0f);
  const int lanes = int(least(n, kWidth));
  const Vec x = load_n(slot.x + c, lanes);
  return slot.pad == nullptr ? x : rounded(x + load_n(slot.pad + c, lanes), slot.x);
}

// The same as words: neighbours are channels.
template <class Maths, typename T>
inline Vec slot_words(const Slot<T>& slot, int64_t c, int64_t n) {
  if constexpr (Maths::pair == 1) {
    return slot_values(slot, c, n);
  } else {
    if (slot.x == nullptr || n <= 0) return set1(0.0f);
    float words[kWidth] = {};
    const int64_t count = least(n, 2 * kWidth);
    if (slot.pad != nullptr) {
      T buffer[2 * kWidth];
      for (int half = 0; half < 2; ++half) store(buffer + half * kWidth, slot_values(slot, c + half * kWidth, count - half * kWidth));
      memcpy(static_cast<void*>(words), buffer, sizeof words);
    } else if (count == 2 * kWidth) {
      memcpy(static_cast<void*>(words), slot.x + c, sizeof words);
    } else {
      memcpy(static_cast<void*>(words), slot.x + c, count * sizeof(T));
    }
    return load(words);
  }
}

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
