#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/units.h"

namespace vlmkern {
namespace {

using Strides = AttentionInputs::Strides;

void check_strides(const char* name, const Strides& s, const AttentionInputs& p) {
  require_stride(name, s.batch, p.batch);
  require_stride(name, s.token, p.tokens);
  require_stride(name, s.head, p.heads);
}

// `pointers`: whether those beyond q, k and v are there
void check(const AttentionInputs& p, int threads, bool pointers) {
  require_dtype(p.dtype);
  require_threads(threads);
  require(p.head_dim >= 1, "sizes: expected head_dim at least 1");
  require_product("sizes", {p.head_dim, p.batch, p.tokens, p.heads});
  check_strides("q", p.q_strides, p);
  check_strides("k", p.k_strides, p);
  check_strides("v", p.v_strides, p);
  require(p.batch * p.tokens * p.heads == 0 || (p.q && p.k && p.v && pointers), "null pointer for a tensor that has elements");
}

int64_t dense(const AttentionInputs& p) { return p.batch * p.tokens * p.heads * p.head_dim; }

int64_t strided(const AttentionInputs& p, const Strides& s) {
  return reach({{p.batch, s.batch}, {p.tokens, s.token}, {p.heads, s.head}}, p.head_dim);
}

// Where the images or segments begin and end.
class Sequences {
 public:
  // `index`: which of the extents is that of the bounds
  Sequences(const AttentionInputs& p, const Extents& extents, size_t index) : count_(p.batch), longest_(p.tokens), tokens_(p.tokens) {
    if (p.cu_seqlens == nullptr) return;
    require(p.batch == 1, "batch: expected 1 for packed tokens");
    require_product("segments", {p.segments, p.heads});
    extents.require_reach(index, "cu_seqlens", p.segments + 1);
    // a copy: what is checked here nobody can write to before it is used
    bounds_.resize(p.segments + 1);
    std::memcpy(bounds_.data(), p.cu_seqlens, bounds_.size() * sizeof(int32_t));
    require(bounds_.front() == 0 && bounds_.back() == p.tokens, "cu_seqlens: expected bounds from 0 to the number of tokens");
    count_ = p.segments, longest_ = 0;
    for (int64_t s = 0; s < p.segments; ++s) {
      require(bounds_[s] <= bounds_[s + 1], "cu_seqlens: expected bounds that never decrease");
      longest_ = std::max<int64_t>(longest_, bounds_[s + 1] - bounds_[s]);
    }
  }

  int64_t count() const { return count_; }
  int64_t longest() const { return longest_; }
  int64_t batch(int64_t sequence) const { return bounds_.empty() ? sequence : 0; }
  int64_t start(int64_t sequence) const { return bounds_.empty() ? 0 : bounds_[sequence]; }
  int64_t tokens(int64_t sequence) const { return bounds_.empty() ? tokens_ : bounds_[sequence + 1] - bounds_[sequence]; }

 private:
  int64_t count_, longest_, tokens_;
  std::vector<int32_t> bounds_;
};

// One head of one image or segment: where it lies in each tensor.
class Head {
 public:
  Head(const AttentionInputs& p, const Sequences& sequences, int64_t sequence, int64_t head)
      : p_(p), head_(head), batch_(sequences.batch(sequence)), start_(sequences.start(sequence)), tokens_(sequences.tokens(sequence)) {}

  int64_t tokens() const { return tokens_; }
  int64_t dense_stride() const { return p_.heads * p_.head_dim; }
  const void* in(const void* base, const Strides& s) const {
    return static_cast<const char*>(base) + (batch_ * s.batch + start_ * s.token + head_ * s.head) * element_size(p_.dtype);
  }
  // one token's stride may be anything, and the kernels step over the last token too
  int64_t stride(const Strides& s) const { return tokens_ > 1 ? s.token : 0; }
  void* in_dense(void* base) const {
    return static_cast<char*>(base) + ((batch_ * p_.tokens + start_) * dense_stride() + head_ * p_.head_dim) * element_size(p_.dtype);
  }
  int64_t lse_index() const { return (batch_ * p_.heads + head_) * p_.tokens + start_; }

 private:
  const AttentionInputs& p_;
  int64_t head_, batch_, start_, tokens_;
};

}  // namespace

void attention_fwd(const Attention& p, int threads, const Extents& extents) {
  check(p, threads, p.out && p.lse);
  extents.require_tensors(6);
  const Sequences sequences(p, extents, 5);
  if (dense(p) == 0) return;
  extents.require_reach(0, "q", strided(p, p.q_strides));
  extents.require_reach(1, "k", strided(p, p.k_strides));
  extents.require_reach(2, "v", strided(p, p.v_strides));
  extents.require_reach(3, "out", dense(p));
  extents.require_reach(4, "lse", dense(p) / p.head_dim);
  const AttentionFwdKernel& kernel = kernels().attention_fwd_kernel;

  // one unit of work is a head of a sequence; with fewer heads than threads, a share of its queries (which packs the
  // keys again). How the work is cut changes no result: each query is computed by itself, in the same order.
  const int64_t heads = sequences.count() * p.heads;
  threads = usable_threads(std::min<int64_t>(threads, p.batch * p.tokens * p.heads / 16));
  const int64_t shares = heads >= threads ? 1 : (threads + heads - 1) / heads;
  over_units(heads * shares, threads, kernel.scratch(p.dtype, sequences.longest(), p.head_dim), [&](int64_t unit, void* scratch) {
    const int64_t share = unit % shares;
    const Head head(p, sequences, unit / shares / p.heads, unit / shares % p.heads);
    if (head.tokens() == 0) return;
    AttentionHead task;
    task.dtype = p.dtype;
    task.q = head.in(p.q, p.q_strides), task.q_stride = head.stride(p.q_strides);
    task.k = head.in(p.k, p.k_strides), task.k_stride = head.stride(p.k_strides);
    task.v = head.in(p.v, p.v_strides), task.v_stride = head.stride(p.v_strides);
    task.out = head.in_dense(p.out), task.out_stride = head.dense_stride();
    task.lse = p.lse + head.lse_index();
    task.tokens = head.tokens(), task.head_dim = p.head_dim, task.scale = p.scale;
    task.query_begin = head.tokens() * share / shares, task.query_end = head.tokens() * (share + 1) / shares;
    kernel.head(task, scratch);
  });
}

void attention_bwd(const AttentionBwd& p, int threads, const Extents& extents) {
  check(p, threads, p.grad && p.out && p.lse && p.dq && p.dk && p.dv);
  check_strides("grad", p.grad_strides, p);
  check_strides("out", p.out_strides, p);
  extents.require_tensors(10);
  const Sequences sequences(p, extents, 9);
  if (dense(p) == 0) return;
  extents.require_reach(0, "grad", strided(p, p.grad_strides));
  extents.require_reach(1, "q", strided(p, p.q_strides));
  extents.require_reach(2, "k", strided(p, p.k_strides));
  extents.require_reach(3, "v", strided(p, p.v_strides));
  extents.require_reach(4, "out", strided(p, p.out_strides));
  extents.require_reach(5, "lse", dense(p) / p.head_dim);
  extents.require_reach(6, "dq", dense(p));
  extents.require_reach(7, "dk", dense(p));
  extents.require_reach(8, "dv", dense(p));
  const AttentionBwdKernel& kernel = kernels().attention_bwd_kernel;

  // the gradients of k and v sum over queries, so a head is not cut
  const int64_t heads = sequences.count() * p.heads;
  over_units(heads, threads, kernel.scratch(p.dtype, sequences.longest(), p.head_dim), [&](int64_t unit, void* scratch) {
    const Head head(p, sequences, unit / p.heads, unit % p.heads);
    if (head.tokens() == 0) return;
    AttentionHeadBwd task;
    task.dtype = p.dtype;
    task.grad = head.in(p.grad, p.grad_strides), task.grad_stride = head.stride(p.grad_strides);
    task.q = head.in(p.q, p.q_strides), task.q_stride = head.stride(p.q_strides);
    task.k = head.in(p.k, p.k_strides), task.k_stride = head.stride(p.k_strides);
    task.v = head.in(p.v, p.v_strides), task.v_stride = head.stride(p.v_strides);
    task.out = head.in(p.out, p.out_strides), task.o_stride = head.stride(p.out_strides);
    task.lse = p.lse + head.lse_index();
    task.dq = head.in_dense(p.dq), task.dk = head.in_dense(p.dk), task.dv = head.in_dense(p.dv);
    task.out_stride = head.dense_stride();
    task.tokens = head.tokens(), task.head_dim = p.head_dim, task.scale = p.scale;
    kernel.head(task, scratch);
  });
}

}  // namespace vlmkern
