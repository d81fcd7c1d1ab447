// Attention of heads over sequences of tokens: what the bindings hand to the dispatcher, and that to the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/dtype.h"

namespace vlmkern {

class Extents;  // cpu/check.h, which the kernels do without

// What becomes of q k before the softmax. Query i of n stands at place i + keys - n and sees the keys from `left` before its
// place to `right` behind it, all of them where negative.
struct AttentionScores {
  float scale;
  float softcap;  // scores are softcap * tanh(scale * q k / softcap); 0 for none
  int64_t left, right;
};

// Cosines and sines by which a sequence's tokens are turned, head_dim / 2 a token; strides are between tokens, in elements.
struct AttentionRotation {
  const float *cos, *sin;  // null for none
  int64_t cos_stride, sin_stride;
  bool interleaved;  // pairs are neighbouring channels, in place of those head_dim / 2 apart
};

// The heads of q that share one of k and v, in one sequence. Everything is rows of head_dim elements; strides are between tokens,
// and where they say so between the group's heads, in elements.
struct AttentionGroup {
  DType dtype;
  const void *q, *k, *v;
  int64_t q_stride, q_head_stride, k_stride, v_stride;
  int64_t heads, queries, keys, head_dim;
  AttentionScores scores;
  AttentionRotation rotate_q, rotate_k;
};

struct AttentionGroupFwd : AttentionGroup {
  void* out;
  int64_t out_stride, out_head_stride;
  float* lse;  // natural log of the sum of exp(scores), one a token; -inf without keys
  int64_t lse_stride, lse_head_stride;
  int64_t begin, end;  // this call's share of the heads' queries, counted head by head
};

// Gradients; those of q and out go with q's heads.
struct AttentionGroupBwd : AttentionGroup {
  const void *grad, *out;
  int64_t grad_stride, grad_head_stride, o_stride, o_head_stride;
  const float* lse;
  int64_t lse_head_stride;
  void *dq, *dk, *dv;
  int64_t dq_stride, dq_head_stride, dkv_stride;
};

// Bytes of scratch, 64-byte aligned, that groups of up to `keys` keys take; and one group.
struct AttentionFwdKernel {
  size_t (*scratch)(DType, int64_t keys, int64_t head_dim, bool rotates);
  void (*group)(const AttentionGroupFwd&, void* scratch);
};
struct AttentionBwdKernel {
  size_t (*scratch)(DType, int64_t keys, int64_t head_dim, bool rotates);
  void (*group)(const AttentionGroupBwd&, void* scratch);
};

// A batch of sequences [B, N, H, D], or packed ones [T, H, D]; strides in elements.
struct AttentionInputs {
  struct Strides {
    int64_t batch, token, head;
  };
  // tables of rotations, [B, N, D / 2] or [N, D / 2], packed [T, D / 2]
  struct Table {
    const float* at;
    int64_t batch, token;
  };
  DType dtype;
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  int64_t batch, queries, keys, heads, kv_heads, head_dim;
  const int32_t *cu_seqlens, *cu_seqlens_k;  // segments + 1 bounds, or null when dense; null for those of the queries
  int64_t segments;
  AttentionScores scores;
  Table cos, sin, cos_k, sin_k;  // null for none
  bool interleaved;
};

struct Attention : AttentionInputs {
  void* out;   // dense [B, N, H, D] or [T, H, D]
  float* lse;  // dense [B, H, N] or [H, T]
};

struct AttentionBwd : AttentionInputs {
  const void *grad, *out;
  Strides grad_strides, out_strides;
  const float* lse;     // dense, as the forward wrote it
  void *dq, *dk, *dv;   // dense, like q, k and v
};

// Extents are those of q, k, v, out, lse (the gradients': grad, q, k, v, out, lse, dq, dk, dv), cu_seqlens, cu_seqlens_k, cos, sin,
// cos_k, sin_k. Throws std::invalid_argument on sizes, strides, bounds, values or extents that cannot be; writes nothing before that.
void attention_fwd(const Attention& problem, int threads, const Extents& extents);
void attention_bwd(const AttentionBwd& problem, int threads, const Extents& extents);

}  // namespace vlmkern
