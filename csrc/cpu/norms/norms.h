// Layer norm and RMS norm of rows, of a sum or of one tensor: what the dispatcher hands to the kernels, and its entry
// points. The two differ in whether rows are centred, that is, whether their mean is taken away first.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace vlmkern {

class Extents;  // cpu/check.h, which the kernels do without

// Rows are counted through three sizes, of which the last runs fastest: a head's view of a fused projection is rows too.
struct NormShape {
  int64_t outer, middle, inner, cols;
};

// An input of that shape, null if there is none: strides in elements, but for that of the columns, which is 1.
struct NormInput {
  const void* data;
  int64_t outer, middle, inner;
};

// summed = x + residual, rounded to the dtype; normed = the norm of that * (weight + offset) + bias. Without residual
// there is no sum, and the norm is that of x. Without weight it is not multiplied, without bias nothing is added.
struct Norm {
  DType dtype;
  bool centred;
  NormShape shape;
  NormInput x, residual;
  const void *weight, *bias;  // [cols]
  void *normed, *summed;      // dense
  float eps, offset;
};

// grad by normed and grad_summed by summed, which may be null -> d_x, dense, which is the gradient by the residual too,
// and d_weight and d_bias [cols], null where they are not wanted.
struct NormBwd {
  DType dtype;
  bool centred;
  NormShape shape;
  NormInput grad, grad_summed, summed;
  const void* weight;
  void *d_x, *d_weight, *d_bias;
  float eps, offset;
};

// Both take the weight with its offset, and the bias, as `widen` gives them, null for none.
struct NormFwdKernel {
  // from [n] + offset -> to [n]
  void (*widen)(DType, const void* from, float offset, float* to, int64_t n);
  // rows begin to end
  void (*run)(const Norm&, const float* weight, const float* bias, int64_t begin, int64_t end);
};

struct NormBwdKernel {
  // rows begin to end; their share of the gradients by weight and bias [cols], each null if it is not wanted
  void (*run)(const NormBwd&, const float* weight, int64_t begin, int64_t end, float* d_weight, float* d_bias);
  // columns begin to end of the sum of shares [count, cols], in their order
  void (*sum)(DType, const float* shares, int64_t count, int64_t cols, int64_t begin, int64_t end, void* to);
};

// Checked and threaded; the number of threads changes no bit of a result. Extents of x, residual, weight, bias, normed
// and summed, and of grad, grad_summed, summed, weight, d_x, d_weight and d_bias. Throw std::invalid_argument on sizes
// and strides that cannot be; touch nothing before that.
void norm_fwd(const Norm& problem, int threads, const Extents& extents);
void norm_bwd(const NormBwd& problem, int threads, const Extents& extents);

}  // namespace vlmkern
