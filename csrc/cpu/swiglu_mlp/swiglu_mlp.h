// Checked, threaded entry points over the per-ISA kernels. Throw std::invalid_argument on sizes or
// strides that do not describe memory the caller can own; touch nothing before that. Extents are those of all tensors,
// in the order in which they are named.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace vlmkern {

class Extents;  // cpu/check.h

void silu_mul_fwd(DType dtype, const void* up, int64_t up_stride, void* out, int64_t rows, int64_t cols, int threads,
                  const Extents& extents);
void silu_mul_bwd(DType dtype, const void* grad, const void* up, int64_t up_stride, void* grad_up, void* hidden, int64_t rows,
                  int64_t cols, int threads, const Extents& extents);

}  // namespace vlmkern
