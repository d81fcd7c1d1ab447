#include "cpu/kernels.h"

#include "cpu/isa.h"

namespace vlmkern {

// The kernels that an ISA has copies of its own of, all or some of them: each source that is compiled for it defines one.
// They are constants without code: nothing compiled for an ISA may run before it is known to be there.
#define VLMKERN_DECLARE(type, name) extern const type name;
#define VLMKERN_TAKE(type, name) all.name = name;
#define VLMKERN_ISA_HAS(isa, OWN)                  \
  namespace isa {                                  \
  OWN(VLMKERN_DECLARE)                             \
  static void take(Kernels& all) { OWN(VLMKERN_TAKE) } \
  }

VLMKERN_ISA_HAS(portable, VLMKERN_KERNELS)
#if VLMKERN_HAVE_AVX2
VLMKERN_ISA_HAS(avx2, VLMKERN_KERNELS)
#endif
#if VLMKERN_HAVE_AVX512
VLMKERN_ISA_HAS(avx512, VLMKERN_KERNELS)
#endif
#if VLMKERN_HAVE_AVX512_BF16
VLMKERN_ISA_HAS(avx512_bf16, VLMKERN_KERNELS)
#endif

#define VLMKERN_WITH_TILES(X)                 \
  X(AttentionFwdKernel, attention_fwd_kernel) \
  X(AttentionBwdKernel, attention_bwd_kernel) \
  X(PoolHeadsKernel, pool_heads_kernel)       \
  X(PoolSlotsBwdKernel, pool_slots_bwd_kernel)
#if VLMKERN_HAVE_AMX
VLMKERN_ISA_HAS(amx, VLMKERN_WITH_TILES)
#endif
#if VLMKERN_HAVE_AMX_EMULATED
VLMKERN_ISA_HAS(amx_emulated, VLMKERN_WITH_TILES)
#endif

namespace {

void take(Isa isa, Kernels& all) {
  switch (isa) {
    case Isa::portable: return portable::take(all);
#if VLMKERN_HAVE_AVX2
    case Isa::avx2: return avx2::take(all);
#endif
#if VLMKERN_HAVE_AVX512
    case Isa::avx512: return avx512::take(all);
#endif
#if VLMKERN_HAVE_AVX512_BF16
    case Isa::avx512_bf16: return avx512_bf16::take(all);
#endif
#if VLMKERN_HAVE_AMX
    case Isa::amx: return amx::take(all);
#endif
#if VLMKERN_HAVE_AMX_EMULATED
    case Isa::amx_emulated: return amx_emulated::take(all);
#endif
    default: return;
  }
}

Kernels of(Isa wanted) {
  Kernels all{};
  for (Isa isa : kAllIsas)
    if (extends(wanted, isa)) take(isa, all);
  return all;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = of(active());
  return table;
}

}  // namespace vlmkern
