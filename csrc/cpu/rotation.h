// Rows turned by angles: pairs of channels (a, b) become (a cos - b sin, b cos + a sin), in float32. Pairs are half a row
// apart, or neighbours. Su et al., "RoFormer" (2021), eq. 34.
#pragma once

#include "cpu/vec.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// `load(c, n)` gives n channels from c on, `store(c, x, n)` takes them; no channel is loaded after it was stored. A
// direction of -1 turns back.
template <class Load, class Store>
void turn(Load load, Store store, const float* cos, const float* sin, bool interleaved, int64_t cols, float direction) {
  const int64_t half = cols / 2;
  if (interleaved) {
    for (int64_t i = 0; i < half; i += Vec::width) {
      const int n = int(half - i < Vec::width ? half - i : Vec::width);
      float x[2 * Vec::width];
      const int first = 2 * n < Vec::width ? 2 * n : Vec::width, second = 2 * n - first;
      VLMKERN_ISA::store(x, load(2 * i, first));
      VLMKERN_ISA::store(x + Vec::width, second > 0 ? load(2 * i + Vec::width, second) : set1(0.0f));
      for (int j = 0; j < n; ++j) {
        const float a = x[2 * j], b = x[2 * j + 1], c = cos[i + j], s = sin[i + j] * direction;
        x[2 * j] = a * c - b * s, x[2 * j + 1] = b * c + a * s;
      }
      store(2 * i, VLMKERN_ISA::load(x), first);
      if (second > 0) store(2 * i + Vec::width, VLMKERN_ISA::load(x + Vec::width), second);
    }
    return;
  }
  for (int64_t i = 0; i < half; i += Vec::width) {
    const int n = int(half - i < Vec::width ? half - i : Vec::width);
    const Vec a = load(i, n), b = load(half + i, n), c = load_n(cos + i, n), s = load_n(sin + i, n) * set1(direction);
    store(i, a * c - b * s, n);
    store(half + i, b * c + a * s, n);
  }
}

// `to` may be `from`.
template <typename From, typename To>
void turn_row(const From* from, const float* cos, const float* sin, bool interleaved, int64_t cols, float direction, To* to) {
  turn([&](int64_t c, int n) { return load_n(from + c, n); }, [&](int64_t c, Vec x, int n) { store_n(to + c, x, n); }, cos, sin,
       interleaved, cols, direction);
}

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
