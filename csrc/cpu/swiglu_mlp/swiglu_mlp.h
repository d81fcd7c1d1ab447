// SwiGLU's elementwise half: what the dispatcher hands to the kernels, and its entry points.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace vlmkern {

class Extents;  // cpu/check.h

struct SiluMulKernel {
  // up [rows, 2*cols] = [value | gate] rows of stride up_stride (elements); out [rows, cols] dense
  void (*fwd)(DType, const void* up, int64_t up_stride, void* out, int64_t rows, int64_t cols);
  // grad [rows, cols] and up as above -> grad_up [rows, 2*cols] and hidden [rows, cols], dense
  void (*bwd)(DType, const void* grad, const void* up, int64_t up_stride, void* grad_up, void* hidden, int64_t rows, int64_t cols);
};

// Checked and threaded. Throw std::invalid_argument on sizes or strides that do not describe memory the caller can own; touch
// nothing before that. Extents are those of all tensors, in the order in which they are named.
void silu_mul_fwd(DType dtype, const void* up, int64_t up_stride, void* out, int64_t rows, int64_t cols, int threads,
                  const Extents& extents);
void silu_mul_bwd(DType dtype, const void* grad, const void* up, int64_t up_stride, void* grad_up, void* hidden, int64_t rows,
                  int64_t cols, int threads, const Extents& extents);

}  // namespace vlmkern
