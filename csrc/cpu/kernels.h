// The table of CPU kernels in use: for each kernel the copy of the widest instruction set that has one.
// Kernels work on the calling thread, allocate nothing and check nothing; the dispatcher of each op checks the
// arguments, allocates and splits the work over threads.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/attention_pool/attention_pool.h"
#include "cpu/linear/linear.h"
#include "cpu/norms/norms.h"
#include "cpu/swiglu_mlp/swiglu_mlp.h"

namespace vlmkern {

// Every kernel: its type, which its op's header declares, and the name under which its source defines a copy per ISA.
#define VLMKERN_KERNELS(X)                       \
  X(AttentionFwdKernel, attention_fwd_kernel)    \
  X(AttentionBwdKernel, attention_bwd_kernel)    \
  X(PoolHeadsKernel, pool_heads_kernel)          \
  X(PoolMeanKernel, pool_mean_kernel)            \
  X(PoolSlotsKernel, pool_slots_kernel)          \
  X(PoolSlotsBwdKernel, pool_slots_bwd_kernel)   \
  X(FewRowsLinearKernel, few_rows_linear_kernel) \
  X(QuickGeluKernel, quick_gelu_kernel)          \
  X(NormFwdKernel, norm_fwd_kernel)              \
  X(NormBwdKernel, norm_bwd_kernel)              \
  X(SiluMulKernel, silu_mul_kernel)

struct Kernels {
#define VLMKERN_MEMBER(type, name) type name;
  VLMKERN_KERNELS(VLMKERN_MEMBER)
#undef VLMKERN_MEMBER
};

// Those of the instruction set in use.
const Kernels& kernels();

}  // namespace vlmkern
