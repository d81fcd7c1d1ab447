#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/units.h"

namespace vlmkern {
namespace {

using Strides = AttentionInputs::Strides;

void check_strides(const char* name, const Strides& s, const AttentionInputs& p) {
  const int64_t sizes[] = {p.batch, p.tokens, p.heads}, strides[] = {s.batch, s.token, s.head};
  for (int i = 0; i < 3; ++i)
    if (sizes[i] > 1 && (strides[i] < 0 || strides[i] > kLimit / sizes[i]))
      throw std::invalid_argument(std::string(name) + ": got a stride of " + std::to_string(strides[i]) + " over " +
                                  std::to_string(sizes[i]) + " entries");
}

// `pointers`: whether those beyond q, k and v are there
void check(const AttentionInputs& p, bool pointers) {
  require(known(p.dtype), "dtype: unknown code");
  require(p.batch >= 0 && p.tokens >= 0 && p.heads >= 0 && p.head_dim >= 1, "sizes must not be negative, head_dim at least 1");
  int64_t elements = p.head_dim;
  for (int64_t size : {p.batch, p.tokens, p.heads}) {
    require(size == 0 || elements <= kLimit / size, "sizes: too large");
    elements *= size;
  }
  check_strides("q", p.q_strides, p);
  check_strides("k", p.k_strides, p);
  check_strides("v", p.v_strides, p);
  require(elements == 0 || (p.q && p.k && p.v && pointers), "null pointer for a tensor that has elements");
  if (p.cu_seqlens == nullptr) return;
  require(p.batch == 1, "batch: expected 1 for packed tokens");
  require(p.segments >= 0, "segments must not be negative");
  require(p.cu_seqlens[0] == 0 && p.cu_seqlens[p.segments] == p.tokens, "cu_seqlens: expected bounds from 0 to the number of tokens");
  for (int64_t s = 0; s < p.segments; ++s) require(p.cu_seqlens[s] <= p.cu_seqlens[s + 1], "cu_seqlens: expected bounds that never decrease");
}

int64_t sequences(const AttentionInputs& p) { return p.cu_seqlens != nullptr ? p.segments : p.batch; }

int64_t longest(const AttentionInputs& p) {
  if (p.cu_seqlens == nullptr) return p.tokens;
  int64_t tokens = 0;
  for (int64_t s = 0; s < p.segments; ++s) tokens = std::max<int64_t>(tokens, p.cu_seqlens[s + 1] - p.cu_seqlens[s]);
  return tokens;
}

// One head of one image or segment: where it lies in each tensor.
class Head {
 public:
  Head(const AttentionInputs& p, int64_t sequence, int64_t head)
      : p_(p),
        head_(head),
        batch_(p.cu_seqlens != nullptr ? 0 : sequence),
        start_(p.cu_seqlens != nullptr ? p.cu_seqlens[sequence] : 0),
        tokens_(p.cu_seqlens != nullptr ? p.cu_seqlens[sequence + 1] - start_ : p.tokens) {}

  int64_t tokens() const { return tokens_; }
  int64_t dense_stride() const { return p_.heads * p_.head_dim; }
  const void* in(const void* base, const Strides& s) const {
    return static_cast<const char*>(base) + (batch_ * s.batch + start_ * s.token + head_ * s.head) * element_size(p_.dtype);
  }
  void* in_dense(void* base) const {
    return static_cast<char*>(base) + ((batch_ * p_.tokens + start_) * dense_stride() + head_ * p_.head_dim) * element_size(p_.dtype);
  }
  int64_t lse_index() const { return (batch_ * p_.heads + head_) * p_.tokens + start_; }

 private:
  const AttentionInputs& p_;
  int64_t head_, batch_, start_, tokens_;
};

}  // namespace

void attention_fwd(const Attention& p, int threads) {
  check(p, p.out && p.lse);
  if (p.batch * p.tokens * p.heads == 0) return;
  const Kernels& k = kernels();

  // one unit of work is a head of a sequence; with fewer heads than threads, a share of its queries (which packs the
  // keys again). How the work is cut changes no result: each query is computed by itself, in the same order.
  const int64_t heads = sequences(p) * p.heads;
  threads = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, p.batch * p.tokens * p.heads / 16)));
  const int64_t shares = heads >= threads ? 1 : (threads + heads - 1) / heads;
  over_units(heads * shares, threads, k.attention_scratch(p.dtype, longest(p), p.head_dim), [&](int64_t unit, void* scratch) {
    const int64_t share = unit % shares;
    const Head head(p, unit / shares / p.heads, unit / shares % p.heads);
    if (head.tokens() == 0) return;
    AttentionHead task;
    task.dtype = p.dtype;
    task.q = head.in(p.q, p.q_strides), task.q_stride = p.q_strides.token;
    task.k = head.in(p.k, p.k_strides), task.k_stride = p.k_strides.token;
    task.v = head.in(p.v, p.v_strides), task.v_stride = p.v_strides.token;
    task.out = head.in_dense(p.out), task.out_stride = head.dense_stride();
    task.lse = p.lse + head.lse_index();
    task.tokens = head.tokens(), task.head_dim = p.head_dim, task.scale = p.scale;
    task.query_begin = head.tokens() * share / shares, task.query_end = head.tokens() * (share + 1) / shares;
    k.attention_head(task, scratch);
  });
}

void attention_bwd(const AttentionBwd& p, int threads) {
  check(p, p.grad && p.out && p.lse && p.dq && p.dk && p.dv);
  check_strides("grad", p.grad_strides, p);
  check_strides("out", p.out_strides, p);
  if (p.batch * p.tokens * p.heads == 0) return;
  const Kernels& k = kernels();

  // the gradients of k and v sum over queries, so a head is not cut
  const int64_t heads = sequences(p) * p.heads;
  over_units(heads, threads, k.attention_bwd_scratch(p.dtype, longest(p), p.head_dim), [&](int64_t unit, void* scratch) {
    const Head head(p, unit / p.heads, unit % p.heads);
    if (head.tokens() == 0) return;
    AttentionHeadBwd task;
    task.dtype = p.dtype;
    task.grad = head.in(p.grad, p.grad_strides), task.grad_stride = p.grad_strides.token;
    task.q = head.in(p.q, p.q_strides), task.q_stride = p.q_strides.token;
    task.k = head.in(p.k, p.k_strides), task.k_stride = p.k_strides.token;
    task.v = head.in(p.v, p.v_strides), task.v_stride = p.v_strides.token;
    task.out = head.in(p.out, p.out_strides), task.o_stride = p.out_strides.token;
    task.lse = p.lse + head.lse_index();
    task.dq = head.in_dense(p.dq), task.dk = head.in_dense(p.dk), task.dv = head.in_dense(p.dv);
    task.out_stride = head.dense_stride();
    task.tokens = head.tokens(), task.head_dim = p.head_dim, task.scale = p.scale;
    k.attention_head_bwd(task, scratch);
  });
}

}  // namespace vlmkern
