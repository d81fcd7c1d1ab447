#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/units.h"

namespace vlmkern {
namespace {

using Strides = AttentionInputs::Strides;
using Table = AttentionInputs::Table;

void check_strides(const char* name, const Strides& s, int64_t batch, int64_t tokens, int64_t heads) {
  require_stride(name, s.batch, batch);
  require_stride(name, s.token, tokens);
  require_stride(name, s.head, heads);
}

bool has_queries(const AttentionInputs& p) { return p.batch * p.queries * p.heads > 0; }
bool has_keys(const AttentionInputs& p) { return p.batch * p.keys * p.kv_heads > 0; }

void check_tables(const AttentionInputs& p) {
  const Table* tables[] = {&p.cos, &p.sin, &p.cos_k, &p.sin_k};
  const char* names[] = {"cos", "sin", "cos_k", "sin_k"};
  require(p.head_dim % 2 == 0, "rotary: expected an even head_dim");
  for (int i = 0; i < 4; ++i) {
    const int64_t tokens = i < 2 ? p.queries : p.keys;
    require_stride(names[i], tables[i]->batch, p.batch);
    require_stride(names[i], tables[i]->token, tokens);
    require(tables[i]->at != nullptr || p.batch * tokens == 0, "rotary: got no table for tokens that are there");
  }
}

// `queries`, `keys`: whether the pointers beyond q, k and v are there that queries and keys need
void check(const AttentionInputs& p, int threads, bool queries, bool keys) {
  require_dtype(p.dtype);
  require_threads(threads);
  require(p.head_dim >= 1, "sizes: expected head_dim at least 1");
  require_product("sizes", {p.head_dim, p.batch, p.queries, p.heads});
  require_product("sizes", {p.head_dim, p.batch, p.keys, p.kv_heads});
  require(p.heads == p.kv_heads || (p.kv_heads > 0 && p.heads % p.kv_heads == 0), "heads: expected a multiple of those of k and v");
  check_strides("q", p.q_strides, p.batch, p.queries, p.heads);
  check_strides("k", p.k_strides, p.batch, p.keys, p.kv_heads);
  check_strides("v", p.v_strides, p.batch, p.keys, p.kv_heads);
  require(!has_queries(p) || (p.q && queries), "null pointer for a tensor that has elements");
  require(!has_keys(p) || (p.k && p.v && keys), "null pointer for a tensor that has elements");
  require(std::isfinite(p.scores.softcap) && p.scores.softcap >= 0, "softcap: expected at least 0");
  if (p.cos.at != nullptr) check_tables(p);
}

int64_t dense(const AttentionInputs& p) { return p.batch * p.queries * p.heads * p.head_dim; }
int64_t dense_keys(const AttentionInputs& p) { return p.batch * p.keys * p.kv_heads * p.head_dim; }

int64_t strided(const AttentionInputs& p, const Strides& s) {
  return reach({{p.batch, s.batch}, {p.queries, s.token}, {p.heads, s.head}}, p.head_dim);
}
int64_t strided_keys(const AttentionInputs& p, const Strides& s) {
  return reach({{p.batch, s.batch}, {p.keys, s.token}, {p.kv_heads, s.head}}, p.head_dim);
}

// What the forward and its gradients read alike: `q` is the place of q among the extents, `bounds` that of cu_seqlens.
void check_reach(const AttentionInputs& p, const Extents& extents, size_t q, size_t bounds) {
  extents.require_reach(q, "q", strided(p, p.q_strides));
  extents.require_reach(q + 1, "k", strided_keys(p, p.k_strides));
  extents.require_reach(q + 2, "v", strided_keys(p, p.v_strides));
  if (p.cos.at == nullptr) return;
  const auto table = [&](size_t place, const char* name, const Table& t, int64_t tokens) {
    extents.require_reach(bounds + place, name, reach({{p.batch, t.batch}, {tokens, t.token}}, p.head_dim / 2));
  };
  table(2, "cos", p.cos, p.queries), table(3, "sin", p.sin, p.queries);
  table(4, "cos_k", p.cos_k, p.keys), table(5, "sin_k", p.sin_k, p.keys);
}

// Where the images or segments begin and end, among queries or among keys.
class Sequences {
 public:
  Sequences(const char* name, const AttentionInputs& p, const int32_t* bounds, int64_t tokens, const Extents& extents, size_t place)
      : count_(p.batch), longest_(tokens), tokens_(tokens) {
    if (bounds == nullptr) return;
    require(p.batch == 1, "batch: expected 1 for packed tokens");
    require_product("segments", {p.segments, std::max<int64_t>(p.heads, 1)});
    extents.require_reach(place, name, p.segments + 1);
    // a copy: what is checked here nobody can write to before it is used
    bounds_.resize(p.segments + 1);
    std::memcpy(bounds_.data(), bounds, bounds_.size() * sizeof(int32_t));
    require(bounds_.front() == 0 && bounds_.back() == tokens, "cu_seqlens: expected bounds from 0 to the number of tokens");
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

struct Both {
  Sequences queries, keys;
  Both(const AttentionInputs& p, const Extents& extents, size_t place)
      : queries("cu_seqlens", p, p.cu_seqlens, p.queries, extents, place),
        keys("cu_seqlens_k", p, p.cu_seqlens_k != nullptr ? p.cu_seqlens_k : p.cu_seqlens, p.keys, extents,
             place + (p.cu_seqlens_k != nullptr)) {
    require(p.cu_seqlens != nullptr || p.cu_seqlens_k == nullptr, "cu_seqlens_k: expected none without cu_seqlens");
  }
};

// Where one sequence of some heads lies in tensors of queries or of keys.
class Place {
 public:
  Place(const AttentionInputs& p, const Sequences& sequences, int64_t sequence, int64_t head, int64_t heads, int64_t all_tokens)
      : p_(p), head_(head), heads_(heads), all_tokens_(all_tokens), batch_(sequences.batch(sequence)), start_(sequences.start(sequence)),
        tokens_(sequences.tokens(sequence)) {}

  int64_t tokens() const { return tokens_; }
  int64_t dense_stride() const { return heads_ * p_.head_dim; }
  const void* in(const void* base, const Strides& s) const {
    return static_cast<const char*>(base) + (batch_ * s.batch + start_ * s.token + head_ * s.head) * element_size(p_.dtype);
  }
  // one token's stride may be anything, and the kernels step over the last token too
  int64_t stride(const Strides& s) const { return tokens_ > 1 ? s.token : 0; }
  void* in_dense(void* base) const {
    return static_cast<char*>(base) + ((batch_ * all_tokens_ + start_) * dense_stride() + head_ * p_.head_dim) * element_size(p_.dtype);
  }
  int64_t lse_index() const { return (batch_ * heads_ + head_) * all_tokens_ + start_; }
  AttentionRotation rotation(const Table& cos, const Table& sin) const {
    if (p_.cos.at == nullptr) return {nullptr, nullptr, 0, 0, false};
    const auto row = [&](const Table& t) { return t.at + batch_ * t.batch + start_ * t.token; };
    return {row(cos), row(sin), tokens_ > 1 ? cos.token : 0, tokens_ > 1 ? sin.token : 0, p_.interleaved};
  }

 private:
  const AttentionInputs& p_;
  int64_t head_, heads_, all_tokens_, batch_, start_, tokens_;
};

// One group: the heads of q that share head `head` of k and v, in one sequence.
struct GroupPlace {
  Place q, kv;
  int64_t heads;
  GroupPlace(const AttentionInputs& p, const Both& sequences, int64_t sequence, int64_t head)
      : q(p, sequences.queries, sequence, head * (p.heads / p.kv_heads), p.heads, p.queries),
        kv(p, sequences.keys, sequence, head, p.kv_heads, p.keys), heads(p.heads / p.kv_heads) {}

  void fill(const AttentionInputs& p, AttentionGroup& group) const {
    group.dtype = p.dtype;
    group.q = q.in(p.q, p.q_strides), group.q_stride = q.stride(p.q_strides), group.q_head_stride = p.q_strides.head;
    group.k = kv.in(p.k, p.k_strides), group.k_stride = kv.stride(p.k_strides);
    group.v = kv.in(p.v, p.v_strides), group.v_stride = kv.stride(p.v_strides);
    group.heads = heads, group.queries = q.tokens(), group.keys = kv.tokens(), group.head_dim = p.head_dim;
    group.scores = p.scores;
    // as far as any token lies: places and ranges stay small
    const int64_t all = group.queries + group.keys;
    group.scores.left = std::min(p.scores.left, all), group.scores.right = std::min(p.scores.right, all);
    group.rotate_q = q.rotation(p.cos, p.sin), group.rotate_k = kv.rotation(p.cos_k, p.sin_k);
  }
};

}  // namespace

void attention_fwd(const Attention& p, int threads, const Extents& extents) {
  check(p, threads, p.out && p.lse, true);
  extents.require_tensors(11);
  const Both sequences(p, extents, 5);
  if (!has_queries(p)) return;
  check_reach(p, extents, 0, 5);
  extents.require_reach(3, "out", dense(p));
  extents.require_reach(4, "lse", dense(p) / p.head_dim);
  const AttentionFwdKernel& kernel = kernels().attention_fwd_kernel;

  // one unit of work is a group of heads of a sequence; with fewer than threads, a share of its queries (which packs the
  // keys again). How the work is cut changes no result: each query is computed by itself, in the same order.
  const int64_t groups = sequences.queries.count() * p.kv_heads;
  threads = usable_threads(std::min<int64_t>(threads, std::max<int64_t>(p.batch * p.queries * p.heads / 16, 1)));
  const int64_t shares = groups >= threads ? 1 : (threads + groups - 1) / groups;
  const size_t scratch_bytes = kernel.scratch(p.dtype, sequences.keys.longest(), p.head_dim, p.cos.at != nullptr);
  over_units(groups * shares, threads, scratch_bytes, [&](int64_t unit, void* scratch) {
    const int64_t share = unit % shares, index = unit / shares;
    const GroupPlace place(p, sequences, index / p.kv_heads, index % p.kv_heads);
    AttentionGroupFwd group;
    place.fill(p, group);
    if (group.queries == 0) return;
    group.out = place.q.in_dense(p.out), group.out_stride = place.q.dense_stride(), group.out_head_stride = p.head_dim;
    group.lse = p.lse + place.q.lse_index(), group.lse_stride = 1, group.lse_head_stride = p.queries;
    const int64_t rows = group.heads * group.queries;
    group.begin = rows * share / shares, group.end = rows * (share + 1) / shares;
    kernel.group(group, scratch);
  });
}

void attention_bwd(const AttentionBwd& p, int threads, const Extents& extents) {
  check(p, threads, p.grad && p.out && p.lse && p.dq, p.dk && p.dv);
  check_strides("grad", p.grad_strides, p.batch, p.queries, p.heads);
  check_strides("out", p.out_strides, p.batch, p.queries, p.heads);
  extents.require_tensors(15);
  const Both sequences(p, extents, 9);
  if (!has_queries(p) && !has_keys(p)) return;
  check_reach(p, extents, 1, 9);
  extents.require_reach(0, "grad", strided(p, p.grad_strides));
  extents.require_reach(4, "out", strided(p, p.out_strides));
  extents.require_reach(5, "lse", dense(p) / p.head_dim);
  extents.require_reach(6, "dq", dense(p));
  extents.require_reach(7, "dk", dense_keys(p));
  extents.require_reach(8, "dv", dense_keys(p));
  const AttentionBwdKernel& kernel = kernels().attention_bwd_kernel;

  // the gradients of k and v sum over queries, so a group is not cut
  const int64_t groups = sequences.queries.count() * p.kv_heads;
  const size_t scratch_bytes = kernel.scratch(p.dtype, sequences.keys.longest(), p.head_dim, p.cos.at != nullptr);
  over_units(groups, threads, scratch_bytes, [&](int64_t unit, void* scratch) {
    const GroupPlace place(p, sequences, unit / p.kv_heads, unit % p.kv_heads);
    AttentionGroupBwd group;
    place.fill(p, group);
    group.grad = place.q.in(p.grad, p.grad_strides), group.grad_stride = place.q.stride(p.grad_strides);
    group.grad_head_stride = p.grad_strides.head;
    group.out = place.q.in(p.out, p.out_strides), group.o_stride = place.q.stride(p.out_strides), group.o_head_stride = p.out_strides.head;
    group.lse = p.lse + place.q.lse_index(), group.lse_head_stride = p.queries;
    group.dq = place.q.in_dense(p.dq), group.dq_stride = place.q.dense_stride(), group.dq_head_stride = p.head_dim;
    group.dk = place.kv.in_dense(p.dk), group.dv = place.kv.in_dense(p.dv), group.dkv_stride = place.kv.dense_stride();
    kernel.group(group, scratch);
  });
}

}  // namespace vlmkern
