// Attention of few queries that see the same keys, as in decoding, where reading the keys and values once is all there is to it.
//
// Rows go by as they lie, unpacked. A score is a sum over channels in the lanes; sixteen keys' sums (as many as there are lanes) are
// transposed and added up together, so that softmax has keys in the lanes. 4 * keys * queries * head_dim FLOPs for 2 * keys * head_dim
// elements read.
#pragma once

#include "cpu/attention/scores.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

template <typename T>
class FewQueries {
 public:
  // 1,744 keys of 8 heads, D = 128, bf16 on Zen 4, in ms here and with keys packed: 1 query of two heads 0.4, 1.4; 4 queries 1.7, 3.2;
  // 8 queries 3.3, 2.9
  static constexpr int64_t kMost = 6;
  static constexpr int64_t kChunk = 64;  // keys: in float32 at D = 128 their values are 32 KB

  // 32-bit words of scratch
  static int64_t words(int64_t head_dim) { return kMost * (2 * padded(head_dim) + kChunk); }

  FewQueries(const AttentionGroupFwd& group, const Scores& scores, float* memory)
      : group_(group), scores_(scores), columns_(padded(group.head_dim)), q_(memory), sums_(q_ + kMost * columns_),
        weights_(sums_ + kMost * columns_) {}

  // The queries from `begin` to `end`, rows of q as they are to be multiplied.
  void attend(const T* q, int64_t stride, int64_t begin, int64_t end, T* out, float* lse) const {
    const int64_t count = end - begin;
    const float sign = group_.scores.scale < 0 ? -1.0f : 1.0f;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < columns_; d += kWidth) {
        store(q_ + r * columns_ + d, load_n(q + r * stride + d, lanes(group_.head_dim - d)) * set1(sign));
        store(sums_ + r * columns_ + d, set1(0.0f));
      }
    float highest[kMost], total[kMost];
    for (int64_t r = 0; r < count; ++r) highest[r] = -kInfinity, total[r] = 0;
    for (int64_t key = 0; key < group_.keys; key += kChunk) {
      const int64_t keys = group_.keys - key < kChunk ? group_.keys - key : kChunk;
      for (int64_t r = 0; r < count; ++r) {
        score(r, key, keys);
        add(r, key, keys, weigh(r, keys, highest[r], total[r]));
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const Vec inverse = set1(1.0f / total[r]);
      for (int64_t d = 0; d < group_.head_dim; d += kWidth)
        store_n(out + (begin + r) * group_.out_stride + d, load(sums_ + r * columns_ + d) * inverse, lanes(group_.head_dim - d));
      lse[(begin + r) * group_.lse_stride] = highest[r] * scores_.scale.after + __builtin_logf(total[r]);
    }
  }

 private:
  static int64_t padded(int64_t head_dim) { return round_up(head_dim, 8 * kWidth); }
  static int lanes(int64_t left) { return int(left < kWidth ? (left > 0 ? left : 0) : kWidth); }

  // weights_[r][key] = the scores of a query, shaped; -inf beyond the last key
  void score(int64_t r, int64_t key, int64_t keys) const {
    const T* k = static_cast<const T*>(group_.k) + key * group_.k_stride;
    const float* q = q_ + r * columns_;
    for (int64_t n = 0; n < keys; n += kWidth) {
      Vec square[kWidth];
      const int64_t here = keys - n < kWidth ? keys - n : kWidth;
      for (int64_t i = 0; i < kWidth; ++i) {
        square[i] = set1(0.0f);
        if (i >= here) continue;
        const T* row = k + (n + i) * group_.k_stride;
        Vec even = set1(0.0f), odd = set1(0.0f);
        int64_t d = 0;
        for (; d + 2 * kWidth <= group_.head_dim; d += 2 * kWidth) {
          even = fma(load(row + d), load(q + d), even);
          odd = fma(load(row + d + kWidth), load(q + d + kWidth), odd);
        }
        for (; d < group_.head_dim; d += kWidth) even = fma(load_n(row + d, lanes(group_.head_dim - d)), load(q + d), even);
        square[i] = even + odd;
      }
      transpose(square);
      Vec s = square[0];
      for (int i = 1; i < kWidth; ++i) s = s + square[i];
      s = scores_.capped() ? scores_.in_caps(s) * scores_.cap() : s * set1(scores_.scale.before);
      float* to = weights_ + r * kChunk + n;
      store(to, s);
      for (int64_t i = here; i < kWidth; ++i) to[i] = -kInfinity;
    }
  }

  // Scores to weights; takes them into the maximum and the sum, and gives by what earlier sums are to be multiplied.
  float weigh(int64_t r, int64_t keys, float& highest, float& total) const {
    float* s = weights_ + r * kChunk;
    Vec top = set1(highest);
    for (int64_t n = 0; n < keys; n += kWidth) top = max(top, load(s + n));
    float tops[kWidth];
    store(tops, top);
    float next = tops[0];
    // NaN stays: no comparison with it is true
    for (int i = 1; i < kWidth; ++i) next = tops[i] <= next ? next : tops[i];
    // while every score is -inf there is no maximum to subtract, and -inf less -inf would be NaN
    const Vec shift = set1(next == -kInfinity ? 0.0f : next), scale = set1(scores_.scale.after * kLog2e);
    float rescale[kWidth];
    store(rescale, exp2_nonpositive<6>((set1(highest) - shift) * scale));
    Vec sum = set1(0.0f);
    for (int64_t n = 0; n < keys; n += kWidth) {
      const Vec p = exp2_nonpositive<6>((load(s + n) - shift) * scale);
      sum = sum + p;
      store(s + n, p);
    }
    total = total * rescale[0] + horizontal_sum(sum);
    highest = next;
    return rescale[0];
  }

  // sums_[r] = sums_[r] * rescale + the chunk's weights times values
  void add(int64_t r, int64_t key, int64_t keys, float rescale) const {
    constexpr int kVectors = 8;
    const T* v = static_cast<const T*>(group_.v) + key * group_.v_stride;
    const float* p = weights_ + r * kChunk;
    for (int64_t d = 0; d < group_.head_dim; d += kVectors * kWidth) {
      Vec sum[kVectors];
      float* to = sums_ + r * columns_ + d;
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[j] = load(to + j * kWidth) * set1(rescale);
      if (d + kVectors * kWidth <= group_.head_dim) {
        for (int64_t n = 0; n < keys; ++n) {
          const Vec weight = set1(p[n]);
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) sum[j] = fma(weight, load(v + n * group_.v_stride + d + j * kWidth), sum[j]);
        }
      } else {
        const int64_t left = group_.head_dim - d;
        for (int64_t n = 0; n < keys; ++n) {
          const Vec weight = set1(p[n]);
          for (int64_t c = 0; c < left; c += kWidth) {
            Vec& at = sum[c / kWidth];
            at = fma(weight, load_n(v + n * group_.v_stride + d + c, lanes(left - c)), at);
          }
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) store(to + j * kWidth, sum[j]);
    }
  }

  const AttentionGroupFwd& group_;
  const Scores& scores_;
  const int64_t columns_;
  float *const q_, *const sums_, *const weights_;
};

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
