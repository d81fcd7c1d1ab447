// A vector of float32 for the ISA this file is compiled for, with loads and stores that convert
// from and to bfloat16 and float16 (round to nearest even), and exp.
//
// Everything sits in a per-ISA namespace and nothing of the standard library is instantiated here:
// an inline function shared between translation units built with different ISA flags could be
// merged by the linker into the copy that crashes on older CPUs.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(VLMKERN_ISA)
#error "VLMKERN_ISA names the namespace of this copy"
#endif

namespace vlmkern {
namespace VLMKERN_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(__AVX512F__)

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// NaN in b comes back: x86 min and max return their second operand when either is NaN
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec fraction(Vec a) { return {_mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
// a * 2^floor(n)
inline Vec scale_by_floor(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec select_equal(Vec a, Vec b, Vec then, Vec otherwise) {
  return {_mm512_mask_mov_ps(otherwise.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), then.v)};
}
inline Vec select_less(Vec a, Vec b, Vec then, Vec otherwise) {
  return {_mm512_mask_mov_ps(otherwise.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), then.v)};
}
inline Vec flip(Vec a, uint32_t bits) {
  return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(int(bits))))};
}

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) {
  // integer rounding, not vcvtneps2bf16: that instruction flushes denormals
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}
inline void store(f16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};
inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec power_of_two(__m256i n) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23))}; }
// in two factors, so that results below the normal range and overflow to infinity come out right
inline Vec scale_by_power(Vec a, Vec n) {
  const __m256i i = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(i, 1);
  return a * power_of_two(half) * power_of_two(_mm256_sub_epi32(i, half));
}
inline Vec floor(Vec a) { return {_mm256_floor_ps(a.v)}; }
inline Vec fraction(Vec a) { return a - floor(a); }
inline Vec scale_by_floor(Vec a, Vec n) { return scale_by_power(a, floor(n)); }
inline Vec select_equal(Vec a, Vec b, Vec then, Vec otherwise) {
  return {_mm256_blendv_ps(otherwise.v, then.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ))};
}
inline Vec select_less(Vec a, Vec b, Vec then, Vec otherwise) {
  return {_mm256_blendv_ps(otherwise.v, then.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline Vec flip(Vec a, uint32_t bits) { return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(int(bits))))}; }

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
inline Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}
inline void store(f16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

// fixed-length arrays: the compiler turns these loops into whatever vectors the baseline has
struct Vec {
#if VLMKERN_EMULATE_TILES
  static constexpr int width = 16;  // as kernels with tiles have it
#else
  static constexpr int width = 8;
#endif
  float v[width];
};
#define VLMKERN_LANES(expr)                                \
  Vec r;                                                   \
  for (int i = 0; i < Vec::width; ++i) r.v[i] = (expr);    \
  return r
inline Vec set1(float x) { VLMKERN_LANES(x); }
inline Vec operator+(Vec a, Vec b) { VLMKERN_LANES(a.v[i] + b.v[i]); }
inline Vec operator-(Vec a, Vec b) { VLMKERN_LANES(a.v[i] - b.v[i]); }
inline Vec operator*(Vec a, Vec b) { VLMKERN_LANES(a.v[i] * b.v[i]); }
inline Vec operator/(Vec a, Vec b) { VLMKERN_LANES(a.v[i] / b.v[i]); }
inline Vec fma(Vec a, Vec b, Vec c) { VLMKERN_LANES(a.v[i] * b.v[i] + c.v[i]); }
inline Vec min(Vec a, Vec b) { VLMKERN_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Vec max(Vec a, Vec b) { VLMKERN_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Vec round(Vec a) { VLMKERN_LANES(__builtin_nearbyintf(a.v[i])); }

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
// the two bfloat16 of a word, the first in the lower half
inline void split_pair(float word, float& first, float& second) {
  first = float_of(bits_of(word) << 16), second = float_of(bits_of(word) & 0xffff0000);
}
inline float power_of_two(int n) { return float_of(uint32_t(n + 127) << 23); }
inline float scale_lane(float a, float n) {
  if (!(n == n)) return a + n;
  const int i = int(n), half = i >> 1;
  return a * power_of_two(half) * power_of_two(i - half);
}
inline Vec scale_by_power(Vec a, Vec n) { VLMKERN_LANES(scale_lane(a.v[i], n.v[i])); }
inline Vec floor(Vec a) { VLMKERN_LANES(__builtin_floorf(a.v[i])); }
inline Vec fraction(Vec a) { return a - floor(a); }
inline Vec scale_by_floor(Vec a, Vec n) { return scale_by_power(a, floor(n)); }
inline Vec select_equal(Vec a, Vec b, Vec then, Vec otherwise) { VLMKERN_LANES(a.v[i] == b.v[i] ? then.v[i] : otherwise.v[i]); }
inline Vec select_less(Vec a, Vec b, Vec then, Vec otherwise) { VLMKERN_LANES(a.v[i] < b.v[i] ? then.v[i] : otherwise.v[i]); }
inline Vec flip(Vec a, uint32_t bits) { VLMKERN_LANES(float_of(bits_of(a.v[i]) ^ bits)); }

inline float widen(float x) { return x; }
inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | (mantissa << 13));
  if (exponent) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = float(mantissa) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}
inline void narrow(float* p, float x) { *p = x; }
inline void narrow(bf16* p, float x) {
  const uint32_t u = bits_of(x);
  p->bits = x == x ? uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}
inline void narrow(f16* p, float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or above
    h = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below the smallest normal: adding 0.5 leaves the rounded denormal in the low bits
    h = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    h = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  p->bits = uint16_t(sign | h);
}
// by way of arrays, as p may lie anywhere, like the addresses of the vector instructions above
template <typename T>
inline Vec load(const T* p) {
  T buffer[Vec::width];
  memcpy(static_cast<void*>(buffer), p, sizeof buffer);
  VLMKERN_LANES(widen(buffer[i]));
}
template <typename T>
inline void store(T* p, Vec a) {
  T buffer[Vec::width];
  for (int i = 0; i < Vec::width; ++i) narrow(buffer + i, a.v[i]);
  memcpy(static_cast<void*>(p), buffer, sizeof buffer);
}
#undef VLMKERN_LANES

#endif

// The first n elements at p, the rest zero; and the first n lanes of a, stored.
template <typename T>
inline Vec load_n(const T* p, int n) {
  if (n >= Vec::width) return load(p);
  T buffer[Vec::width];
  memset(static_cast<void*>(buffer), 0, sizeof buffer);
  memcpy(static_cast<void*>(buffer), p, n * sizeof(T));
  return load(buffer);
}
template <typename T>
inline void store_n(T* p, Vec a, int n) {
  if (n >= Vec::width) return store(p, a);
  T buffer[Vec::width];
  store(buffer, a);
  memcpy(static_cast<void*>(p), buffer, n * sizeof(T));
}

// a rounded to T and back, as if it had gone through a tensor of that dtype
inline Vec rounded(Vec a, const float*) { return a; }
template <typename T>
inline Vec rounded(Vec a, const T*) {
  T buffer[Vec::width];
  store(buffer, a);
  return load(buffer);
}

// e^x: n = round(x / ln 2), Taylor polynomial of degree 6 on |r| <= ln(2)/2 (truncation 1.2e-7 of
// the result). The clamps sit just outside the range where float32 over- or underflows.
inline Vec exp(Vec x) {
  x = min(set1(89.0f), max(set1(-104.0f), x));
  const Vec n = round(x * set1(1.44269504088896341f));
  Vec r = fma(n, set1(-0.693145751953125f), x);  // ln 2 in two parts, the first exact in 15 bits
  r = fma(n, set1(-1.42860682030941723e-6f), r);
  Vec p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale_by_power(p, n);
}

// 2^x for x <= 0, as the softmax needs it; 0 far below, NaN stays. Fits of 2^r on [0, 1), exact at 0, with a
// relative error of 2e-9 (degree 6) or 9e-5 (degree 3, for results that are rounded to 8 bits).
template <int degree>
inline Vec exp2_nonpositive(Vec x) {
#if !defined(__AVX512F__)
  x = max(set1(-200.0f), x);  // there, reducing and scaling by -inf are defined and give 0
#endif
  const Vec r = fraction(x);
  Vec p;
  if (degree == 3) {
    p = fma(set1(0.07706704399998643f), r, set1(0.22764498773850575f));
    p = fma(p, r, set1(0.695116787846446f));
  } else {
    p = fma(set1(0.0002161291532406101f), r, set1(0.00124678463242138f));
    p = fma(p, r, set1(0.00967545158215985f));
    p = fma(p, r, set1(0.05548528060976324f));
    p = fma(p, r, set1(0.24022930555458388f));
    p = fma(p, r, set1(0.6931470444431065f));
  }
  return scale_by_floor(fma(p, r, set1(1.0f)), x);
}

// tanh, within a few units in the last place: by 2^x, and near 0, where that cancels, by its series up to x^9.
inline Vec tanh(Vec x) {
  const Vec size = max(x, set1(0.0f) - x), t = exp2_nonpositive<6>(size * set1(-2 * 1.44269504088896341f));
  const Vec far = (set1(1.0f) - t) / (set1(1.0f) + t), square = x * x;
  Vec p = set1(62.0f / 2835);
  p = fma(p, square, set1(-17.0f / 315));
  p = fma(p, square, set1(2.0f / 15));
  p = fma(p, square, set1(-1.0f / 3));
  p = fma(p, square, set1(1.0f));
  return select_less(size, set1(0.3f), x * p, select_less(x, set1(0.0f), set1(0.0f) - far, far));
}

// rows[i] becomes column i of the square that rows held
inline void transpose(Vec (&rows)[Vec::width]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d lo = _mm512_castps_pd(a[i + j]), hi = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 x = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), y = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 z = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd), w = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    rows[j].v = _mm512_shuffle_f32x4(x, y, 0x88);
    rows[8 + j].v = _mm512_shuffle_f32x4(x, y, 0xdd);
    rows[4 + j].v = _mm512_shuffle_f32x4(z, w, 0x88);
    rows[12 + j].v = _mm512_shuffle_f32x4(z, w, 0xdd);
  }
#else
  float from[Vec::width][Vec::width], to[Vec::width][Vec::width];
  for (int i = 0; i < Vec::width; ++i) store(from[i], rows[i]);
  for (int i = 0; i < Vec::width; ++i)
    for (int j = 0; j < Vec::width; ++j) to[j][i] = from[i][j];
  for (int i = 0; i < Vec::width; ++i) rows[i] = load(to[i]);
#endif
}

// The lanes' sum, in the same order whatever came before.
inline float horizontal_sum(Vec a) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
#else
  const __m256 eight = a.v;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float lanes[Vec::width];
  store(lanes, a);
  for (int half = Vec::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

template <typename T>
inline float to_float(const T* p) {
  float lanes[Vec::width];
  store(lanes, load_n(p, 1));
  return lanes[0];
}
template <typename T>
inline void from_float(T* p, float x) {
  store_n(p, set1(x), 1);
}

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
