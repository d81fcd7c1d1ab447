// Non-causal attention of one head over one segment of tokens: what the dispatcher hands to the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/dtype.h"

namespace vlmkern {

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

// A batch of images [B, N, H, D] or packed segments [T, H, D]; strides in elements.
struct Attention {
  DType dtype;
  const void *q, *k, *v;
  struct Strides {
    int64_t batch, token, head;
  } q_strides, k_strides, v_strides;
  void* out;   // dense [B, N, H, D] or [T, H, D]
  float* lse;  // dense [B, H, N] or [H, T]
  int64_t batch, tokens, heads, head_dim;
  const int32_t* cu_seqlens;  // segments + 1 bounds, or null when dense
  int64_t segments;
  float scale;
};

// Throws std::invalid_argument on sizes, strides or bounds that cannot be; touches nothing before that.
void attention_fwd(const Attention& problem, int threads);

}  // namespace vlmkern
