// Attention of the heads that share keys and values, over one sequence, with the online softmax of softmax.h.
//
// Queries lie in the SIMD lanes: S^T = K Q^T and O^T = V^T P^T are computed as tiles of 8 rows (keys, then channels)
// times up to three vectors of queries, so the head dimension is only ever broadcast. It needs no padding to a
// vector's width (72 = 9 * 8), and maximum, exponential and sum run down the lanes without a horizontal step.
//
// Per (head, block of queries): 4 * keys * queries * head_dim FLOPs, of the keys from the first to the last that one of the
// queries sees; those on the way that others do not see are scored -inf. Scratch traffic stays in L1 and L2: keys go by in
// chunks, and a chunk's scores, the block's queries and its output sums are 50 KB at D = 72.
//
// bfloat16 with AVX512_BF16 multiplies pairs of neighbours (along the head dimension, then along the keys) with
// vdpbf16ps, with AMX tiles of them, see tile_products.h; everything else is widened to float32 when packed. Sums, scores
// and softmax are float32 throughout.
#include "cpu/attention/attention.h"
#include "cpu/attention/softmax.h"
#include "cpu/attention/tile_products.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// Unscaled scores of `count` keys (any number up to kChunk) against the block; highest[j] takes in their maximum.
template <class Maths, int vectors>
void score(const float* k, int64_t head_words, int64_t count, const float* q, float* s, Vec (&highest)[vectors]) {
  for (int64_t key = 0; key < count; key += kRows) {
    Vec sum[kRows][vectors] = {};
    multiply<Maths, vectors>(sum, k + key * head_words, head_words, 1, q, head_words);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        const Vec x = key + r < count ? sum[r][j] : set1(-kInfinity);
        highest[j] = max(highest[j], x);
        store(s + ((key + r) * vectors + j) * kWidth, x);
      }
    }
  }
}

// o[channel][lanes] = o * rescale + V^T P^T over one chunk of keys
template <class Maths, int vectors>
void add_values(const float* v, int64_t channels, int64_t steps, const float* p, bool first, const Vec (&rescale)[vectors], float* o) {
  for (int64_t c = 0; c < channels; c += kRows) {
    Vec sum[kRows][vectors] = {};
    float* here = o + c * vectors * kWidth;
    multiply<Maths, vectors>(sum, v + c, 1, channels, p, steps);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        float* to = here + (r * vectors + j) * kWidth;
        // each chunk is summed apart and then added: rounding grows with the chunk's length, not the segment's
        store(to, first ? sum[r][j] : fma(load(to), rescale[j], sum[r][j]));
      }
    }
  }
}

// The products of softmax.h by vectors. Everything in it counts in 32-bit words: a float32, or a pair of bfloat16.
template <class M>
struct VectorProducts {
  using Maths = M;
  using Registers = NoRegisters;
  static constexpr int kChunk = 256;  // bf16 at D = 72 on Zen 5: 128 keys 377 GFLOP/s, 256 412, 384 411
  static constexpr int64_t kBlock = kMaxVectors * kWidth;
  static constexpr int64_t kStep = kGroup;

  int64_t keys, head_dim;
  int64_t head_words, channels, padded_keys;  // words of a q or k row
  float *k, *v, *q, *rows, *s, *p, *o;

  VectorProducts(int64_t keys, int64_t head_dim, float* memory)
      : keys(keys), head_dim(head_dim), head_words((head_dim + Maths::pair - 1) / Maths::pair), channels(round_up(head_dim, kGroup)),
        padded_keys(round_up(keys, kGroup)) {
    place(memory);
  }

  // returns the words taken
  int64_t place(float* memory) {
    int64_t taken = 0;
    auto take = [&](int64_t words) {
      float* here = memory == nullptr ? nullptr : memory + taken;
      taken += round_up(words, 16);  // each part starts on a cache line
      return here;
    };
    k = take(padded_keys * head_words);
    v = take(padded_keys / Maths::pair * channels);
    q = take(head_words * kBlock);
    rows = take(kWidth * head_words);
    s = take(kChunk * kBlock);
    p = Maths::pair == 1 ? s : take(kChunk / Maths::pair * kBlock);
    o = take(channels * kBlock);
    return taken;
  }
  static int64_t words(int64_t keys, int64_t head_dim) { return VectorProducts(keys, head_dim, nullptr).place(nullptr); }
  static int64_t padded(int64_t count) { return count; }

  template <class Body>
  static void over_vectors(int64_t left, Body body) {
    // a remainder of four vectors goes as two and two: a tile of one has too few sums to hide the latency of an add
    by_vectors(left == 4 ? 2 : left, body);
  }

  template <typename T>
  void pack_keys(const T* from_k, int64_t k_stride, const T* from_v, int64_t v_stride) const {
    pack_words<Maths>(from_k, k_stride, keys, head_dim, padded_keys, head_words, k);
    pack_rows<Maths>(from_v, v_stride, keys, head_dim, padded_keys, channels, v);
  }
  template <int vectors, typename T>
  void pack_queries(const T* from, int64_t stride, int64_t count, uint32_t flipped_bits) const {
    pack_block<Maths, vectors>(from, stride, count, head_dim, head_words, rows, q, flipped_bits);
  }
  template <int vectors>
  void score(int64_t key, int64_t count, Vec (&highest)[vectors]) const {
    VLMKERN_ISA::score<Maths, vectors>(k + key * head_words, head_words, count, q, s, highest);
  }
  template <int vectors>
  void accumulate(int64_t key, int64_t count, bool first, const Vec (&rescale)[vectors]) const {
    add_values<Maths, vectors>(v + key / Maths::pair * channels, channels, (count + Maths::pair - 1) / Maths::pair, p, first, rescale, o);
  }
};

#if VLMKERN_TILES
using Bf16Products = TileProducts;
#elif VLMKERN_BF16_PAIRS
using Bf16Products = VectorProducts<Bf16Pairs>;
#else
using Bf16Products = VectorProducts<Float32>;
#endif

size_t scratch_bytes(DType dtype, int64_t keys, int64_t head_dim, bool rotates) {
  const int64_t words = dtype == DType::bf16 ? Bf16Products::words(keys, head_dim) : VectorProducts<Float32>::words(keys, head_dim);
  const int64_t few = FewQueries<float>::words(head_dim);
  return ((words > few ? words : few) + (rotates ? rotation_words(keys, head_dim) : 0)) * sizeof(float);
}

void run_group(const AttentionGroupFwd& group, void* scratch) {
  switch (group.dtype) {
    case DType::f32: return attend<VectorProducts<Float32>, float>(group, scratch);
    case DType::bf16: return attend<Bf16Products, bf16>(group, scratch);
    case DType::f16: return attend<VectorProducts<Float32>, f16>(group, scratch);
  }
}

}  // namespace

extern const AttentionFwdKernel attention_fwd_kernel{scratch_bytes, run_group};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
