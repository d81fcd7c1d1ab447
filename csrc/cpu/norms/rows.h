// What norms need of rows: where they begin, their mean and the inverse of their deviation from it.
//
// A row is read once for both, about a pivot that is one of its own values or near: about 0 the variance would be lost in
// rounding where means are large.
#pragma once

#include "cpu/norms/norms.h"
#include "cpu/vec.h"

namespace vlmkern {
namespace VLMKERN_ISA {

constexpr int kWidth = Vec::width;
// partial sums, which hide the latency of an addition
constexpr int kSums = 4;
// Columns after which sums of a row begin again, so that a single large value drowns few others.
constexpr int64_t kBlock = 512;

// Rows in the order in which they are counted.
class Cursor {
 public:
  Cursor(const NormShape& shape, int64_t row)
      : middle_size_(shape.middle), inner_size_(shape.inner), outer_(row / (shape.middle * shape.inner)),
        middle_(row / shape.inner % shape.middle), inner_(row % shape.inner) {}

  template <typename T>
  const T* of(const NormInput& t) const {
    return static_cast<const T*>(t.data) + outer_ * t.outer + middle_ * t.middle + inner_ * t.inner;
  }
  void next() {
    if (++inner_ < inner_size_) return;
    inner_ = 0;
    if (++middle_ < middle_size_) return;
    middle_ = 0, ++outer_;
  }

 private:
  int64_t middle_size_, inner_size_;
  int64_t outer_, middle_, inner_;
};

// Calls f(column, lanes, partial sum) for vectors of columns begin to end.
template <class F>
inline void over_columns(int64_t begin, int64_t end, F f) {
  int64_t c = begin;
  for (; c + kSums * kWidth <= end; c += kSums * kWidth) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) f(c + k * kWidth, kWidth, k);
  }
  for (; c < end; c += kWidth) f(c, int(end - c < kWidth ? end - c : kWidth), 0);
}

// The same a block at a time, with fold() after each.
template <class F, class G>
inline void over_blocks(int64_t cols, F f, G fold) {
  for (int64_t c = 0; c < cols; c += kBlock) {
    over_columns(c, cols - c < kBlock ? cols : c + kBlock, f);
    fold();
  }
}

inline Vec joined(const Vec (&sums)[kSums]) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }

// a with zeros from lane n on
inline Vec first_n(Vec a, int n) {
  if (n >= kWidth) return a;
  float lanes[kWidth] = {};
  store_n(lanes, a, n);
  return load(lanes);
}

// What a row is normed with: (x - mean) * scale.
struct Moments {
  float mean, scale;
};

// Sums over a row, about a pivot: of d = x - pivot and of d^2. For RMS norm the pivot is 0 and there is no mean.
template <bool centred>
struct RowSums {
  float pivot;
  Vec first[kSums] = {}, second[kSums] = {}, firsts = {}, seconds = {};

  explicit RowSums(float about) : pivot(about) {}

  Vec add(Vec x, int n, int k) {
    if (centred) {
      x = first_n(x - set1(pivot), n);
      first[k] = first[k] + x;
    }
    second[k] = fma(x, x, second[k]);
    return x;
  }

  // At the end of a block.
  void fold() {
    if (centred) firsts = firsts + joined(first);
    seconds = seconds + joined(second);
    for (int k = 0; k < kSums; ++k) first[k] = second[k] = set1(0.0f);
  }

  // Whether the variance, which is what the mean of d^2 has beyond the square of that of d, keeps all but one of its bits
  // in the difference. If not, as where nothing is finite, `out` has the mean for another pass, about that, which is `last`.
  bool close(int64_t cols, float eps, bool last, Moments& out) const {
    const float square = horizontal_sum(seconds) / float(cols);
    float variance = square;
    bool near = true;
    out.mean = 0.0f;
    if (centred) {
      const float shift = horizontal_sum(firsts) / float(cols);
      near = shift * shift <= 0.5f * square && square <= __FLT_MAX__;
      if (near) variance = square - shift * shift;
      out.mean = pivot + shift;
    }
    out.scale = 1.0f / __builtin_sqrtf(variance + eps);
    return near || last;
  }
};

// The mean of a row's first vector of n lanes, from which the mean of all is rarely further than half their deviation.
inline float pivot_of(Vec first, int n) { return horizontal_sum(first * set1(1.0f / float(n))); }

inline int lanes_of(int64_t cols) { return int(cols < kWidth ? cols : kWidth); }

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
