// The table of CPU kernels: one copy per ISA, filled by the kernel sources, read by the dispatchers.
// Kernels work on the calling thread, allocate nothing and check nothing; the dispatcher of each op checks the
// arguments, allocates and splits the work over threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/attention/attention.h"
#include "cpu/attention_pool/attention_pool.h"
#include "cpu/dtype.h"
#include "cpu/linear/linear.h"

namespace vlmkern {

struct Kernels {
  // Bytes of scratch, 64-byte aligned, that attention_head wants for segments of up to `tokens`.
  size_t (*attention_scratch)(DType, int64_t tokens, int64_t head_dim);
  void (*attention_head)(const AttentionHead&, void* scratch);
  // The same two for the gradients.
  size_t (*attention_bwd_scratch)(DType, int64_t tokens, int64_t head_dim);
  void (*attention_head_bwd)(const AttentionHeadBwd&, void* scratch);

  // Windows per vector: blocks of windows are multiples of it, but for the last.
  int64_t (*attention_pool_lanes)();
  // Bytes of scratch, 64-byte aligned, that attention_pool_heads wants for windows of `size` slots.
  size_t (*attention_pool_scratch)(DType, int64_t size, int64_t heads, int64_t key_dim, int64_t value_dim);
  void (*attention_pool_heads)(const PoolHeads&, void* scratch);
  void (*attention_pool_mean)(const PoolWindows&, int64_t begin, int64_t end, void* mean);
  // scratch: a vector per slot of a window
  void (*attention_pool_slots)(const PoolWindows&, const void* q, int64_t begin, int64_t end, float scale, void* scratch, void* pooled);
  // Windows begin to end of all; scratch: 2 floats per head and slot of a window
  void (*attention_pool_slots_bwd)(const PoolSlotsBwd&, int64_t begin, int64_t end, void* scratch);

  // Outputs begin to end of all rows.
  void (*linear_few_rows)(const FewRowsLinear&, int64_t begin, int64_t end);

  // up [rows, 2*cols] = [value | gate] rows of stride up_stride (elements); out [rows, cols] dense.
  void (*silu_mul_fwd)(DType, const void* up, int64_t up_stride, void* out, int64_t rows, int64_t cols);
  // grad [rows, cols] and up as above -> grad_up [rows, 2*cols] and hidden [rows, cols], dense.
  void (*silu_mul_bwd)(DType, const void* grad, const void* up, int64_t up_stride, void* grad_up, void* hidden, int64_t rows,
                       int64_t cols);
};

// The table of the instruction set in use.
const Kernels& kernels();

}  // namespace vlmkern
