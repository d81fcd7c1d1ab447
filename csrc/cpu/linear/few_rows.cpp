// y = x W^T + b for up to four rows of x. Every weight is read once, in the order in which it lies in memory, so the
// time is that of reading W: rows * inputs * outputs * 2 FLOPs against inputs * outputs elements of traffic.
//
// One output is one dot product at a time with four partial sums. Taking several weight rows together would save the
// horizontal sums, but splits the read into streams that each start cold in a page of their own.
#include "cpu/linear/linear.h"

#include "cpu/vec.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

constexpr int kWidth = Vec::width;
constexpr int kSums = 4;
// bytes ahead of the read; 1 to 4 KiB are within 2 % of each other on Zen 5, none costs a fifth
constexpr int64_t kAhead = 2048;

#if defined(__AVX512BF16__)
// 32 products at a time, their pairs summed in float32
struct Bf16Step {
  using Element = bf16;
  static constexpr int length = 2 * kWidth;
  static Vec word(const bf16* p) { return {_mm512_loadu_ps(reinterpret_cast<const float*>(p))}; }
  static Vec word_n(const bf16* p, int n) {
    bf16 buffer[length] = {};
    memcpy(static_cast<void*>(buffer), p, n * sizeof(bf16));
    return word(buffer);
  }
  static Vec add(Vec x, Vec w, Vec sum) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)x.v, (__m512bh)w.v)}; }
};
#endif

template <typename T>
struct WideStep {
  using Element = T;
  static constexpr int length = kWidth;
  static Vec word(const T* p) { return load(p); }
  static Vec word_n(const T* p, int n) { return load_n(p, n); }
  static Vec add(Vec x, Vec w, Vec sum) { return fma(x, w, sum); }
};

template <class Step, int rows>
void outputs(const FewRowsLinear& p, int64_t begin, int64_t end) {
  using T = typename Step::Element;
  constexpr int64_t kStride = Step::length;
  const T* x = static_cast<const T*>(p.x);
  const T* w = static_cast<const T*>(p.weight) + begin * p.weight_stride;
  T* y = static_cast<T*>(p.y);
  for (int64_t n = begin; n < end; ++n, w += p.weight_stride) {
    Vec sum[rows][kSums] = {};
    int64_t k = 0;
    for (; k + kSums * kStride <= p.inputs; k += kSums * kStride) {
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        const T* here = w + k + i * kStride;
        __builtin_prefetch(reinterpret_cast<const char*>(here) + kAhead);
        const Vec weight = Step::word(here);
#pragma GCC unroll 4
        for (int m = 0; m < rows; ++m) sum[m][i] = Step::add(Step::word(x + m * p.x_stride + k + i * kStride), weight, sum[m][i]);
      }
    }
    for (; k < p.inputs; k += kStride) {
      const int left = int(p.inputs - k < kStride ? p.inputs - k : kStride);
      const Vec weight = Step::word_n(w + k, left);
      for (int m = 0; m < rows; ++m) sum[m][0] = Step::add(Step::word_n(x + m * p.x_stride + k, left), weight, sum[m][0]);
    }
    const float bias = p.bias ? to_float(static_cast<const T*>(p.bias) + n) : 0.0f;
    for (int m = 0; m < rows; ++m)
      from_float(y + m * p.outputs + n, horizontal_sum((sum[m][0] + sum[m][1]) + (sum[m][2] + sum[m][3])) + bias);
  }
}

template <class Step>
void outputs(const FewRowsLinear& p, int64_t begin, int64_t end) {
  switch (p.rows) {
    case 1: return outputs<Step, 1>(p, begin, end);
    case 2: return outputs<Step, 2>(p, begin, end);
    case 3: return outputs<Step, 3>(p, begin, end);
    case 4: return outputs<Step, 4>(p, begin, end);
  }
}

void run(const FewRowsLinear& problem, int64_t begin, int64_t end) {
  switch (problem.dtype) {
    case DType::f32: return outputs<WideStep<float>>(problem, begin, end);
#if defined(__AVX512BF16__)
    case DType::bf16: return outputs<Bf16Step>(problem, begin, end);
#else
    case DType::bf16: return outputs<WideStep<bf16>>(problem, begin, end);
#endif
    case DType::f16: return outputs<WideStep<f16>>(problem, begin, end);
  }
}

}  // namespace

extern const FewRowsLinearKernel few_rows_linear_kernel{run};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
