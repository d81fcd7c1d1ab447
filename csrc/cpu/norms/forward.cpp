// summed = x + residual and the layer norm or RMS norm of it, row by row; statistics are float32 and those of the sum as
// rounded. Ba, Kiros and Hinton, "Layer Normalization" (2016); Zhang and Sennrich, "Root Mean Square Layer
// Normalization" (2019).
//
// Traffic: each tensor once, as a row is read again from the first cache. About 10 FLOPs an element.
#include "cpu/norms/rows.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// Of x + residual, which goes to `summed`, or of x.
template <typename T, bool centred>
Moments measure(const T* x, const T* residual, T* summed, int64_t cols, float eps) {
  // columns c to c + n as rounded; what was stored is read again, as to round in registers takes longer
  auto sum = [&](int64_t c, int n) {
    if (!residual) return load_n(x + c, n);
    store_n(summed + c, load_n(x + c, n) + load_n(residual + c, n), n);
    return load_n(summed + c, n);
  };
  const int lanes = lanes_of(cols);
  RowSums<centred> sums(centred ? pivot_of(sum(0, lanes), lanes) : 0.0f);
  over_blocks(cols, [&](int64_t c, int n, int k) { sums.add(sum(c, n), n, k); }, [&] { sums.fold(); });
  Moments found;
  if (sums.close(cols, eps, false, found)) return found;
  RowSums<centred> again(found.mean);
  const T* stored = residual ? summed : x;
  over_blocks(cols, [&](int64_t c, int n, int k) { again.add(load_n(stored + c, n), n, k); }, [&] { again.fold(); });
  again.close(cols, eps, true, found);
  return found;
}

template <typename T, bool centred>
void norm(const Norm& p, const float* weight, const float* bias, int64_t begin, int64_t end) {
  const int64_t cols = p.shape.cols;
  Cursor at(p.shape, begin);
  for (int64_t row = begin; row < end; ++row, at.next()) {
    const T *x = at.of<T>(p.x), *residual = p.residual.data ? at.of<T>(p.residual) : nullptr;
    T* summed = residual ? static_cast<T*>(p.summed) + row * cols : nullptr;
    T* normed = static_cast<T*>(p.normed) + row * cols;
    const Moments moments = measure<T, centred>(x, residual, summed, cols, p.eps);
    const Vec mean = set1(moments.mean), scale = set1(moments.scale);
    if (residual) x = summed;
    over_columns(0, cols, [&](int64_t c, int n, int) {
      Vec y = load_n(x + c, n);
      if (centred) y = y - mean;
      y = y * scale;
      if (weight) y = y * load_n(weight + c, n);
      if (bias) y = y + load_n(bias + c, n);
      store_n(normed + c, y, n);
    });
  }
}

template <typename T>
void norm(const Norm& p, const float* weight, const float* bias, int64_t begin, int64_t end) {
  return p.centred ? norm<T, true>(p, weight, bias, begin, end) : norm<T, false>(p, weight, bias, begin, end);
}

void run(const Norm& p, const float* weight, const float* bias, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::f32: return norm<float>(p, weight, bias, begin, end);
    case DType::bf16: return norm<bf16>(p, weight, bias, begin, end);
    case DType::f16: return norm<f16>(p, weight, bias, begin, end);
  }
}

template <typename T>
void widen(const T* from, float offset, float* to, int64_t n) {
  over_columns(0, n, [&](int64_t c, int lanes, int) { store_n(to + c, load_n(from + c, lanes) + set1(offset), lanes); });
}

void run_widen(DType dtype, const void* from, float offset, float* to, int64_t n) {
  switch (dtype) {
    case DType::f32: return widen(static_cast<const float*>(from), offset, to, n);
    case DType::bf16: return widen(static_cast<const bf16*>(from), offset, to, n);
    case DType::f16: return widen(static_cast<const f16*>(from), offset, to, n);
  }
}

}  // namespace

extern const NormFwdKernel norm_fwd_kernel{run_widen, run};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
