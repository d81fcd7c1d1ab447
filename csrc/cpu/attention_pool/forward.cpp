// Attention pooling with many heads, see heads.h: by tiles in bfloat16 where the CPU has AMX, else by vectors.
#include "cpu/attention_pool/attention_pool.h"
#include "cpu/attention_pool/tile_heads.h"
#include "cpu/attention_pool/vector_heads.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

#if VLMKERN_TILES
using Bf16Heads = TileHeads;
#elif VLMKERN_BF16_PAIRS
using Bf16Heads = VectorHeads<Bf16Pairs, bf16>;
#else
using Bf16Heads = VectorHeads<Float32, bf16>;
#endif

int64_t most_windows(DType dtype) { return dtype == DType::bf16 ? Bf16Heads::kBlock : VectorHeads<Float32, float>::kBlock; }

size_t scratch_bytes(const PoolHeads& task) {
  return sizeof(float) * (task.windows.dtype == DType::bf16 ? Bf16Heads::words(task) : VectorHeads<Float32, float>::words(task));
}

void run_heads(const PoolHeads& task, void* scratch) {
  switch (task.windows.dtype) {
    case DType::f32: return pool_heads<VectorHeads<Float32, float>, float>(task, scratch);
    case DType::bf16: return pool_heads<Bf16Heads, bf16>(task, scratch);
    case DType::f16: return pool_heads<VectorHeads<Float32, f16>, f16>(task, scratch);
  }
}

}  // namespace

extern const PoolHeadsKernel pool_heads_kernel{kWidth, most_windows, scratch_bytes, run_heads};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
