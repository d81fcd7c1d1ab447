// The table of CPU kernels: one copy per ISA, filled by the kernel sources, read by dispatch.cpp.
// Kernels do one contiguous piece of work on the calling thread and check nothing; dispatch.cpp
// checks the arguments and splits the work over threads.
#pragma once

#include <cstdint>

namespace vlmkern {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Kernels {
  // up [rows, 2*cols] = [value | gate] rows of stride up_stride (elements); out [rows, cols] dense.
  void (*silu_mul_fwd)(DType, const void* up, int64_t up_stride, void* out, int64_t rows, int64_t cols);
  // grad [rows, cols] and up as above -> grad_up [rows, 2*cols] and hidden [rows, cols], dense.
  void (*silu_mul_bwd)(DType, const void* grad, const void* up, int64_t up_stride, void* grad_up, void* hidden, int64_t rows,
                       int64_t cols);
};

#define VLMKERN_DECLARE(isa) \
  namespace isa {            \
  const Kernels& kernels();  \
  }
VLMKERN_DECLARE(portable)
VLMKERN_DECLARE(avx2)
VLMKERN_DECLARE(avx512)
VLMKERN_DECLARE(avx512_bf16)
#undef VLMKERN_DECLARE

}  // namespace vlmkern
