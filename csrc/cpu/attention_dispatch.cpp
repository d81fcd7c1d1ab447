#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/check.h"
#include "cpu/kernels.h"

namespace vlmkern {
namespace {

void check_strides(const char* name, const Attention::Strides& s, const Attention& p) {
  const int64_t sizes[] = {p.batch, p.tokens, p.heads}, strides[] = {s.batch, s.token, s.head};
  for (int i = 0; i < 3; ++i)
    if (sizes[i] > 1 && (strides[i] < 0 || strides[i] > kLimit / sizes[i]))
      throw std::invalid_argument(std::string(name) + ": got a stride of " + std::to_string(strides[i]) + " over " +
                                  std::to_string(sizes[i]) + " entries");
}

void check(const Attention& p) {
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
  require(elements == 0 || (p.q && p.k && p.v && p.out && p.lse), "null pointer for a tensor that has elements");
  if (p.cu_seqlens == nullptr) return;
  require(p.batch == 1, "batch: expected 1 for packed tokens");
  require(p.segments >= 0, "segments must not be negative");
  require(p.cu_seqlens[0] == 0 && p.cu_seqlens[p.segments] == p.tokens, "cu_seqlens: expected bounds from 0 to the number of tokens");
  for (int64_t s = 0; s < p.segments; ++s) require(p.cu_seqlens[s] <= p.cu_seqlens[s + 1], "cu_seqlens: expected bounds that never decrease");
}

}  // namespace

void attention_fwd(const Attention& p, int threads) {
  check(p);
  if (p.batch * p.tokens * p.heads == 0) return;
  const Kernels& k = kernels();
  const bool packed = p.cu_seqlens != nullptr;
  const int64_t sequences = packed ? p.segments : p.batch;
  int64_t longest = packed ? 0 : p.tokens;
  for (int64_t s = 0; packed && s < sequences; ++s) longest = std::max<int64_t>(longest, p.cu_seqlens[s + 1] - p.cu_seqlens[s]);

  // one unit of work is a head of a sequence; with fewer heads than threads, a share of its queries (which packs the
  // keys again). How the work is cut changes no result: each query is computed by itself, in the same order.
  const int64_t heads = sequences * p.heads;
  threads = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, p.batch * p.tokens * p.heads / 16)));
  const int64_t shares = heads >= threads ? 1 : (threads + heads - 1) / heads;
  const int64_t units = heads * shares;

  const size_t scratch = (k.attention_scratch(p.dtype, longest, p.head_dim) + kAlignment - 1) / kAlignment * kAlignment;
  // before the threads start: an exception could not leave a parallel region
  const std::unique_ptr<void, Free> memory(std::aligned_alloc(kAlignment, scratch * threads));
  if (!memory) throw std::bad_alloc();

  const int64_t size = element_size(p.dtype);
  auto run = [&](int64_t unit, void* mine) {
    const int64_t share = unit % shares, head = unit / shares % p.heads, sequence = unit / shares / p.heads;
    const int64_t start = packed ? p.cu_seqlens[sequence] : 0;
    const int64_t tokens = packed ? p.cu_seqlens[sequence + 1] - start : p.tokens;
    if (tokens == 0) return;
    const int64_t batch = packed ? 0 : sequence;
    auto at = [&](const void* base, const Attention::Strides& s) {
      return static_cast<const char*>(base) + (batch * s.batch + start * s.token + head * s.head) * size;
    };
    AttentionHead task;
    task.dtype = p.dtype;
    task.q = at(p.q, p.q_strides), task.q_stride = p.q_strides.token;
    task.k = at(p.k, p.k_strides), task.k_stride = p.k_strides.token;
    task.v = at(p.v, p.v_strides), task.v_stride = p.v_strides.token;
    task.out_stride = p.heads * p.head_dim;
    task.out = static_cast<char*>(p.out) + ((batch * p.tokens + start) * task.out_stride + head * p.head_dim) * size;
    task.lse = p.lse + (batch * p.heads + head) * p.tokens + start;
    task.tokens = tokens, task.head_dim = p.head_dim, task.scale = p.scale;
    task.query_begin = tokens * share / shares, task.query_end = tokens * (share + 1) / shares;
    k.attention_head(task, mine);
  };
  if (threads == 1) {
    for (int64_t unit = 0; unit < units; ++unit) run(unit, memory.get());
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    void* mine = static_cast<char*>(memory.get()) + scratch * omp_get_thread_num();
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) run(unit, mine);
  }
}

}  // namespace vlmkern
