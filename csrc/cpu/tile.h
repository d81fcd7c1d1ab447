// What the kernels with products in them share: operands packed as words, and the register tile that multiplies them.
//
// A word is 32 bits: a float32, or with AVX512_BF16 a pair of bfloat16 that vdpbf16ps multiplies and adds in one step.
// One operand is broadcast, word by word; the other lies in the SIMD lanes.
#pragma once

#include "cpu/vec.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

constexpr int kWidth = Vec::width;
constexpr int kMaxVectors = 3;
#if defined(__AVX512F__)
constexpr int kRows = 8;  // 8 x 3 accumulators, 3 vectors in the lanes and a broadcast: 28 of 32 registers
#else
constexpr int kRows = 4;  // 4 x 3 + 3 + 1 = 16 of 16
#endif
constexpr int kGroup = 8;  // rows of operands are padded to this many, whatever kRows is
constexpr float kInfinity = __builtin_inff();
constexpr float kLn2 = 0.693147180559945309f, kLog2e = 1.44269504088896341f;

// A number that the compiler knows.
template <int n>
struct Int {
  static constexpr int value = n;
};

// Calls body with the vectors of a block, an Int, where there are `n`, at least one.
template <class Body>
void by_vectors(int64_t n, Body body) {
  switch (n) {
    case 1: return body(Int<1>());
    case 2: return body(Int<2>());
    default: return body(Int<3>());
  }
}

// What a thread must hold while it multiplies by vectors: nothing.
struct NoRegisters {
  NoRegisters() {}
};

struct Float32 {
  static constexpr int pair = 1;
  static constexpr uint32_t sign_bits = 0x80000000;
  static constexpr int exp2_degree = 6;
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

// A positive scale of scores in two parts: scores * before, then their differences * after, which overflows and vanishes
// less. `before` is 1 unless `after`, or its product with log2(e), were no normal number: 0 times the -inf that stands
// for a key that is not there would be NaN, as would be infinity times no difference.
struct Scale {
  float before, after;
  explicit Scale(float scale) : before(1), after(scale) {
    if (!(scale >= __FLT_MIN__)) before = scale, after = 1;
    if (scale > __FLT_MAX__ / 2) before = 2, after = scale / 2;
  }
};

// The same of any scale: the scores take its sign, as maxima are taken before scaling.
struct SignedScale : Scale {
  explicit SignedScale(float scale) : Scale(scale < 0 ? -scale : scale) {
    if (scale < 0) before = -before;
  }
};

#if defined(__AVX512BF16__) || VLMKERN_EMULATE_TILES
#define VLMKERN_BF16_PAIRS 1
#else
#define VLMKERN_BF16_PAIRS 0
#endif

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  static constexpr int pair = 2;
  static constexpr uint32_t sign_bits = 0x80008000;
  static constexpr int exp2_degree = 3;
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)}; }
};

// (first, second) of each lane, rounded to bfloat16, as neighbours
inline Vec interleave(Vec first, Vec second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18,
                                         2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves))};
}

// rounded to bfloat16, kWidth / 2 words
inline void store_halves(float* words, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), (__m256i)_mm512_cvtneps_pbh(a.v));
}

// interleave() of bfloat16 that were widened: their bits are on top, so the second stays there and the first moves down
inline Vec pair_up(Vec first, Vec second) {
  return {_mm512_or_ps(_mm512_castsi512_ps(_mm512_srli_epi32(_mm512_castps_si512(first.v), 16)), second.v)};
}

// pairs of ones, by which multiply_add() sums the two values of each lane
inline Vec ones_of_pairs() { return {_mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80))}; }

#elif VLMKERN_BF16_PAIRS
struct Bf16Pairs {
  static constexpr int pair = 2;
  static constexpr uint32_t sign_bits = 0x80008000;
  static constexpr int exp2_degree = 3;
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    for (int i = 0; i < kWidth; ++i) {
      float first_a, second_a, first_b, second_b;
      split_pair(a.v[i], first_a, second_a), split_pair(b.v[i], first_b, second_b);
      sum.v[i] += first_a * first_b + second_a * second_b;
    }
    return sum;
  }
};

inline Vec interleave(Vec first, Vec second) {
  bf16 low[kWidth], high[kWidth];
  store(low, first), store(high, second);
  for (int i = 0; i < kWidth; ++i) first.v[i] = float_of(low[i].bits | uint32_t(high[i].bits) << 16);
  return first;
}
inline void store_halves(float* words, Vec a) { store(reinterpret_cast<bf16*>(words), a); }
inline Vec pair_up(Vec first, Vec second) {
  for (int i = 0; i < kWidth; ++i) first.v[i] = float_of(bits_of(first.v[i]) >> 16 | bits_of(second.v[i]));
  return first;
}
inline Vec ones_of_pairs() { return set1(float_of(0x3f803f80)); }
#endif

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One row of a tensor as words, zero beyond it where they are pairs.
template <class Maths, typename T>
void pack_row(const T* from, int64_t head_dim, int64_t words, float* to) {
  if constexpr (Maths::pair == 1) {
    (void)words;
    for (int64_t d = 0; d < head_dim; d += kWidth) {
      const int n = int(head_dim - d < kWidth ? head_dim - d : kWidth);
      store_n(to + d, load_n(from + d, n), n);
    }
  } else {
    for (int64_t w = head_dim / 2; w < words; ++w) to[w] = 0;
    memcpy(static_cast<void*>(to), from, head_dim * sizeof(T));
  }
}

// Rows of a tensor as rows of words, zero beyond them.
template <class Maths, typename T>
void pack_words(const T* from, int64_t stride, int64_t rows, int64_t head_dim, int64_t padded_rows, int64_t words, float* to) {
  for (int64_t n = 0; n < rows; ++n) pack_row<Maths>(from + n * stride, head_dim, words, to + n * words);
  memset(static_cast<void*>(to + rows * words), 0, (padded_rows - rows) * words * sizeof(float));
}

// Rows as [padded_rows / pair][padded_cols] words: the neighbours of a pair come from two rows. Zero beyond the rows and columns.
template <class Maths, typename T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t cols, int64_t padded_rows, int64_t padded_cols, float* to) {
  for (int64_t first = 0; first < padded_rows; first += Maths::pair, to += padded_cols) {
    for (int64_t d = 0; d < padded_cols; d += kWidth) {
      const int lanes = int(padded_cols - d < kWidth ? padded_cols - d : kWidth);
      const int64_t left = cols - d;
      const int n = int(left < lanes ? (left > 0 ? left : 0) : lanes);
      Vec words = first < rows ? load_n(from + first * stride + d, n) : set1(0.0f);
#if VLMKERN_BF16_PAIRS
      if constexpr (Maths::pair == 2) words = pair_up(words, first + 1 < rows ? load_n(from + (first + 1) * stride + d, n) : set1(0.0f));
#endif
      store_n(to + d, words, lanes);
    }
  }
}

// Up to kWidth rows of words into the lanes: to[word * lane_stride + lane], zero in lanes beyond `count`.
inline void pack_lanes(const float* rows, int64_t count, int64_t words, float* to, int64_t lane_stride, uint32_t flipped_bits) {
  for (int64_t w = 0; w < words; w += kWidth) {
    const int n = int(words - w < kWidth ? words - w : kWidth);
    Vec square[kWidth];
    for (int i = 0; i < kWidth; ++i) square[i] = i < count ? load_n(rows + i * words + w, n) : set1(0.0f);
    transpose(square);
    for (int i = 0; i < n; ++i) store(to + (w + i) * lane_stride, flip(square[i], flipped_bits));
  }
}

// Up to vectors * kWidth rows of a tensor into the lanes: to[word][vectors][lane], zero in lanes beyond `count`.
// `rows` is scratch for kWidth rows of words.
template <class Maths, int vectors, typename T>
void pack_block(const T* from, int64_t stride, int64_t count, int64_t head_dim, int64_t words, float* rows, float* to, uint32_t flipped_bits) {
  for (int j = 0; j < vectors; ++j, from += kWidth * stride, count -= kWidth) {
    const int64_t here = count < kWidth ? (count > 0 ? count : 0) : kWidth;
    for (int64_t i = 0; i < here; ++i) pack_row<Maths>(from + i * stride, head_dim, words, rows + i * words);
    pack_lanes(rows, here, words, to + j * kWidth, vectors * kWidth, flipped_bits);
  }
}

// The way back, for one vector of lanes: `count` rows of factor * sums[channel * lane_stride + lane].
template <typename T>
void unpack_lanes(const float* sums, int64_t lane_stride, int64_t count, int64_t head_dim, Vec factor, T* to, int64_t stride) {
  for (int64_t d = 0; d < head_dim; d += kWidth) {
    const int n = int(head_dim - d < kWidth ? head_dim - d : kWidth);
    Vec square[kWidth];
    for (int i = 0; i < kWidth; ++i) square[i] = i < n ? load(sums + (d + i) * lane_stride) * factor : set1(0.0f);
    transpose(square);
    for (int64_t i = 0; i < count; ++i) store_n(to + i * stride + d, square[i], n);
  }
}

// sum[r][j] += sum over steps of a[r * a_row + step * a_step] * b[step * b_step + j * kWidth]
template <class Maths, int vectors>
inline __attribute__((always_inline)) void multiply(Vec (&sum)[kRows][vectors], const float* a, int64_t a_row, int64_t a_step,
                                                    const float* b, int64_t steps, int64_t b_step = vectors * kWidth) {
  for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
    Vec lanes[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) lanes[j] = load(b + j * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec x = set1(a[r * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[r][j] = Maths::multiply_add(x, lanes[j], sum[r][j]);
    }
  }
}

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
