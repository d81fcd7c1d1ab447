#include "cpu/kernels.h"

#include "cpu/isa.h"

namespace vlmkern {

// each ISA's copies of the kernel entry points, defined by the kernel sources
#define VLMKERN_TABLE(isa)                                                                                              \
  namespace isa {                                                                                                       \
  size_t attention_scratch(DType, int64_t, int64_t);                                                                    \
  void attention_head(const AttentionHead&, void*);                                                                     \
  size_t attention_bwd_scratch(DType, int64_t, int64_t);                                                                \
  void attention_head_bwd(const AttentionHeadBwd&, void*);                                                              \
  int64_t attention_pool_lanes();                                                                                       \
  size_t attention_pool_scratch(DType, int64_t, int64_t, int64_t, int64_t);                                             \
  void attention_pool_heads(const PoolHeads&, void*);                                                                   \
  void attention_pool_mean(const PoolWindows&, int64_t, int64_t, void*);                                                \
  void attention_pool_slots(const PoolWindows&, const void*, int64_t, int64_t, float, void*, void*);                    \
  void attention_pool_slots_bwd(const PoolSlotsBwd&, int64_t, int64_t, void*);                                          \
  void linear_few_rows(const FewRowsLinear&, int64_t, int64_t);                                                         \
  void silu_mul_fwd(DType, const void*, int64_t, void*, int64_t, int64_t);                                              \
  void silu_mul_bwd(DType, const void*, const void*, int64_t, void*, void*, int64_t, int64_t);                          \
  static const Kernels table{attention_scratch, attention_head, attention_bwd_scratch, attention_head_bwd,              \
                             attention_pool_lanes, attention_pool_scratch, attention_pool_heads, attention_pool_mean,   \
                             attention_pool_slots, attention_pool_slots_bwd, linear_few_rows, silu_mul_fwd,             \
                             silu_mul_bwd};                                                                             \
  }

VLMKERN_TABLE(portable)
#if VLMKERN_HAVE_AVX2
VLMKERN_TABLE(avx2)
#endif
#if VLMKERN_HAVE_AVX512
VLMKERN_TABLE(avx512)
#endif
#if VLMKERN_HAVE_AVX512_BF16
VLMKERN_TABLE(avx512_bf16)
#endif

const Kernels& kernels() {
  switch (active()) {
#if VLMKERN_HAVE_AVX512_BF16
    case Isa::avx512_bf16: return avx512_bf16::table;
#endif
#if VLMKERN_HAVE_AVX512
    case Isa::avx512: return avx512::table;
#endif
#if VLMKERN_HAVE_AVX2
    case Isa::avx2: return avx2::table;
#endif
    default: return portable::table;
  }
}

}  // namespace vlmkern
