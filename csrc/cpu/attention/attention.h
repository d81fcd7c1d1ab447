// Non-causal attention of one head over one segment of tokens: what the dispatcher hands to the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/dtype.h"

namespace vlmkern {

class Extents;  // cpu/check.h, which the kernels do without

// All of q, k, v and out are rows of head_dim elements; strides are between tokens, in elements.
struct AttentionHead {
  DType dtype;
  const void *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  void* out;
  int64_t out_stride;
  float* lse;  // one per token, dense: natural log of the sum of exp(scaled scores)
  int64_t tokens;
  int64_t head_dim;
  float scale;
  int64_t query_begin, query_end;  // this call's share of the queries
};

// The same for the gradients: all queries of the head.
struct AttentionHeadBwd {
  DType dtype;
  const void *grad, *q, *k, *v, *out;
  int64_t grad_stride, q_stride, k_stride, v_stride, o_stride;
  const float* lse;
  void *dq, *dk, *dv;
  int64_t out_stride;  // of all three
  int64_t tokens;
  int64_t head_dim;
  float scale;
};

// Bytes of scratch, 64-byte aligned, that a head of up to `tokens` tokens takes; and one head.
struct AttentionFwdKernel {
  size_t (*scratch)(DType, int64_t tokens, int64_t head_dim);
  void (*head)(const AttentionHead&, void* scratch);
};
struct AttentionBwdKernel {
  size_t (*scratch)(DType, int64_t tokens, int64_t head_dim);
  void (*head)(const AttentionHeadBwd&, void* scratch);
};

// A batch of images [B, N, H, D] or packed segments [T, H, D]; strides in elements.
struct AttentionInputs {
  struct Strides {
    int64_t batch, token, head;
  };
  DType dtype;
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides;
  int64_t batch, tokens, heads, head_dim;
  const int32_t* cu_seqlens;  // segments + 1 bounds, or null when dense
  int64_t segments;
  float scale;
};

struct Attention : AttentionInputs {
  void* out;   // dense [B, N, H, D] or [T, H, D]
  float* lse;  // dense [B, H, N] or [H, T]
};

struct AttentionBwd : AttentionInputs {
  const void *grad, *out;
  Strides grad_strides, out_strides;
  const float* lse;     // dense, as the forward wrote it
  void *dq, *dk, *dv;   // dense, like `out` of the forward
};

// Extents are those of all tensors in the order of Python's arguments, cu_seqlens last. Throws std::invalid_argument on
// sizes, strides, bounds or extents that cannot be; writes nothing before that.
void attention_fwd(const Attention& problem, int threads, const Extents& extents);
void attention_bwd(const AttentionBwd& problem, int threads, const Extents& extents);

}  // namespace vlmkern
