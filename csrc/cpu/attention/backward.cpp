// Gradients of attention by q, k and v, of the heads that share k and v, over one sequence.
//
// With P = exp(scale * Q K^T - lse) recomputed and delta = rowsum(dO * O):
//     dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale * dS K,  dK = scale * dS^T Q,
// dS times the slope of a cap, dV and dK summed over heads, and dQ and dK turned back where q and k were turned. Where lse is so large that its rounding shows in P, a block's maxima, sums and delta are computed again: two products
// more, so 14 instead of 10 * queries * keys * head_dim.
//
// S^T = K Q^T and dP^T = V dO^T are tiles of keys times queries in the SIMD lanes, as in forward.cpp. dQ^T = K^T dS^T
// takes dS^T as it comes, queries in the lanes; in dV = P^T dO and dK the rows of P^T and dS^T are what is broadcast,
// and channels lie in the lanes. So nothing is transposed, at the price of channels padded to whole vectors.
//
// 10 * queries * keys * head_dim FLOPs a head, the exponentials once. Blocks of queries go by outside, chunks of keys inside: a
// block's weights by a chunk's keys and its sums of dQ stay in L2; the sums of dK and dV of all keys, in float32, are
// read and written once a block. Every sum is taken in one order, whatever the number of threads.
//
// bfloat16 with AVX512_BF16 multiplies pairs (of channels, keys or queries), so P and dS are rounded to bfloat16
// before their products; with AMX by tiles, see tile_gradients.h. Everything else is widened to float32.
#include "cpu/attention/attention.h"
#include "cpu/attention/gradients.h"
#include "cpu/attention/rotary.h"
#include "cpu/attention/tile_gradients.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// The largest lse whose rounding to float32 stays below that of the gradients: 2^-18 and 2^-14 of a weight.
template <typename T>
constexpr float kMaxLse = sizeof(T) == sizeof(float) ? 64.0f : 1024.0f;

// P and dS of one chunk of keys and up to kLanes queries.
template <class Form, int vectors, class Weights>
void weigh(const Layout<Form>& layout, const Scratch<Form>& scratch, int64_t part, Range chunk, const Weights& weights) {
  using Maths = typename Form::Maths;
  constexpr int64_t kRow = vectors * kWidth, kLanes = Form::kLanes, kQueries = Form::kQueries;
  const int64_t count = chunk.end - chunk.begin;
  const float* keys = scratch.keys + chunk.begin * layout.key_words;
  const float* values = scratch.values + chunk.begin * layout.head_words;
  const float* q = scratch.q_lanes + part * layout.head_words * kLanes;
  const float* grad = scratch.grad_lanes + part * layout.head_words * kLanes;
  float tile[kRows * kRow], slopes[Weights::kShaped ? kRows * kRow : 1];

  for (int64_t key = 0; key < count; key += kRows) {
    {
      Vec sum[kRows][vectors] = {};
      multiply<Maths, vectors>(sum, keys + key * layout.key_words, layout.key_words, 1, q, layout.head_words);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) store(tile + r * kRow + j * kWidth, sum[r][j]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        float* at = tile + r * kRow + j * kWidth;
        const Weight weight = weights.of(load(at), key + r, j);
        store(at, key + r < count ? weight.p : set1(0.0f));
        if constexpr (Weights::kShaped) store(slopes + r * kRow + j * kWidth, weight.slope);
      }
    }
    Vec sum[kRows][vectors] = {};
    multiply<Maths, vectors>(sum, values + key * layout.head_words, layout.head_words, 1, grad, layout.head_words);
    const auto weight_at = [&](int r, int j) {
      return Weight{load(tile + r * kRow + j * kWidth), Weights::kShaped ? load(slopes + r * kRow + j * kWidth) : set1(1.0f)};
    };
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r += Maths::pair) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        const Weight weight = weight_at(r, j);
        const Vec ds = weights.gradient(weight, sum[r][j], j);
        const int64_t at = (key + r) * kQueries + part * kLanes + j * kWidth;
        if constexpr (Maths::pair == 1) {
          store(scratch.p + at, weight.p);
          store(scratch.ds + at, ds);
        } else {
#if VLMKERN_BF16_PAIRS
          const Weight next = weight_at(r + 1, j);
          const Vec next_ds = weights.gradient(next, sum[r + 1][j], j);
          store_halves(scratch.p + at / 2, weight.p);
          store_halves(scratch.p + (at + kQueries) / 2, next.p);
          store_halves(scratch.ds + at / 2, ds);
          store_halves(scratch.ds + (at + kQueries) / 2, next_ds);
          store(ds_part(scratch, part) + (key + r) / 2 * kRow + j * kWidth, interleave(ds, next_ds));
#endif
        }
      }
    }
  }
}

// sums[row][j] (+)= sum over steps of a[row * a_row + step * a_step] * b[step * b_step + j * kWidth], rows by kRows
template <class Maths, int vectors>
void add_product(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t steps, bool first,
                 float* sums, int64_t sums_row) {
  for (int64_t row = 0; row < rows; row += kRows) {
    Vec sum[kRows][vectors] = {};
    multiply<Maths, vectors>(sum, a + row * a_row, a_row, a_step, b, steps, b_step);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        float* to = sums + (row + r) * sums_row + j * kWidth;
        // each part is summed apart and then added: rounding grows with the part's length, not the segment's
        store(to, first ? sum[r][j] : load(to) + sum[r][j]);
      }
    }
  }
}

// The same with channels in the lanes: a chunk's rows of weights by a block's rows of q or grad.
template <class Maths>
void add_rows(int64_t rows, const float* weights, int64_t a_row, const float* b, int64_t columns, int64_t steps, bool first, float* sums) {
  for (int64_t c = 0; c < columns;) {
    const int64_t left = (columns - c) / kWidth;
    // four vectors go as two and two: a tile of one has too few sums to hide the latency of an add
    const int vectors = left == 4 ? 2 : int(left < kMaxVectors ? left : kMaxVectors);
    switch (vectors) {
      case 1: add_product<Maths, 1>(rows, weights, a_row, 1, b + c, columns, steps, first, sums + c, columns); break;
      case 2: add_product<Maths, 2>(rows, weights, a_row, 1, b + c, columns, steps, first, sums + c, columns); break;
      default: add_product<Maths, 3>(rows, weights, a_row, 1, b + c, columns, steps, first, sums + c, columns); break;
    }
    c += vectors * kWidth;
  }
}

// By vectors.
template <class M>
struct VectorForm {
  using Maths = M;
  using Registers = NoRegisters;
  static constexpr bool kTiled = false;
  // 1 to 8 times kLanes queries by 32 to 256 keys take the same time within 6 % on Zen 5
  static constexpr int kLanes = kMaxVectors * kWidth, kQueries = 3 * kLanes, kChunk = 96;
  static constexpr int kStep = M::pair, kKeys = kGroup, kKeyRows = kRows, kChannels = kGroup;

  template <class Body>
  static void over_vectors(int64_t n, Body body) {
    by_vectors(n, body);
  }
  template <typename T>
  static void pack_keys(const Layout<VectorForm>& layout, const T* k, int64_t stride, int64_t tokens, int64_t head_dim, float* to) {
    pack_rows<Maths>(k, stride, tokens, head_dim, layout.keys, layout.channels, to);
  }
  template <int vectors, class Weights>
  static void weigh(const Layout<VectorForm>& layout, const Scratch<VectorForm>& scratch, int64_t part, Range keys, const Weights& weights) {
    VLMKERN_ISA::weigh<VectorForm, vectors>(layout, scratch, part, keys, weights);
  }
  template <int vectors>
  static void add_dq(const Layout<VectorForm>& layout, const Scratch<VectorForm>& scratch, int64_t part, Range keys, bool first) {
    add_product<Maths, vectors>(layout.channels, scratch.key_pairs + keys.begin / Maths::pair * layout.channels, 1, layout.channels,
                                ds_part(scratch, part), ds_step<VectorForm, vectors>(),
                                (keys.end - keys.begin + Maths::pair - 1) / Maths::pair, first, scratch.dq + part * layout.channels * kLanes,
                                vectors * kWidth);
  }
  static void add_rows(int64_t rows, const float* weights, const float* b, int64_t columns, int64_t steps, bool first, float* sums) {
    VLMKERN_ISA::add_rows<Maths>(rows, weights, kWeightRow<VectorForm>, b, columns, steps, first, sums);
  }
};

template <typename T>
float dot(const T* a, const T* b, int64_t n) {
  Vec sum = set1(0.0f);
  for (int64_t d = 0; d < n; d += kWidth) {
    const int lanes = int(n - d < kWidth ? n - d : kWidth);
    sum = fma(load_n(a + d, lanes), load_n(b + d, lanes), sum);
  }
  return horizontal_sum(sum);
}

template <typename T>
void write_rows(const float* sums, int64_t columns, int64_t rows, int64_t head_dim, Vec factor, T* to, int64_t stride) {
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t d = 0; d < head_dim; d += kWidth) {
      const int lanes = int(head_dim - d < kWidth ? head_dim - d : kWidth);
      store_n(to + n * stride + d, load_n(sums + n * columns + d, lanes) * factor, lanes);
    }
  }
}

// One head of a group: where its queries lie.
template <typename T>
struct HeadBwd {
  Rows<T> q, grad, out;
  const float* lse;
  T* dq;
};

// Room for keys, a block of queries, and rows of gradients, where they are turned.
template <typename T>
struct Turned {
  T *keys, *queries;
  float* rows;
  static int64_t words(int64_t keys, int64_t block, int64_t head_dim) { return (keys + block + kWidth) * head_dim; }
  Turned(float* memory, int64_t tokens, int64_t block, int64_t head_dim)
      : keys(reinterpret_cast<T*>(memory)), queries(reinterpret_cast<T*>(memory + tokens * head_dim)), rows(memory + (tokens + block) * head_dim) {}
};

// A part of a block: the queries from `begin` to `end`, up to kLanes, with the vectors they take known to the compiler.
template <class Form, int vectors, typename T>
struct Part {
  using Maths = typename Form::Maths;
  const AttentionGroupBwd& group;
  const Scores& scores;
  const Layout<Form>& layout;
  const Scratch<Form>& scratch;
  int64_t part, begin, end;

  void pack(Rows<T> q, Rows<T> grad) const {
    const int64_t at = part * layout.head_words * Form::kLanes;
    pack_block<Maths, vectors>(q.at, q.stride, end - begin, group.head_dim, layout.head_words, scratch.rows, scratch.q_lanes + at,
                               group.scores.scale < 0 ? Maths::sign_bits : 0);
    pack_block<Maths, vectors>(grad.at, grad.stride, end - begin, group.head_dim, layout.head_words, scratch.rows, scratch.grad_lanes + at, 0);
  }
  void settle() const { VLMKERN_ISA::settle<Form, vectors>(layout, scratch, part, scores, begin, end); }
  void take_chunk(Range keys, bool first, bool settled) const {
    if (scores.capped() || !scores.all_seen(begin, end, keys))
      weigh<From::shaped>(keys, settled);
    else if (settled)
      weigh<From::settled>(keys, settled);
    else
      weigh<From::lse>(keys, settled);
    Form::template add_dq<vectors>(layout, scratch, part, keys, first);
  }
  void finish(const HeadBwd<T>& head, const Turned<T>& turned) const {
    for (int64_t n = begin; n < end; n += kWidth) {
      const int64_t lanes = end - n < kWidth ? end - n : kWidth;
      const float* sums = scratch.dq + part * layout.channels * Form::kLanes + (n - begin);
      T* to = head.dq + n * group.dq_stride;
      if (group.rotate_q.cos == nullptr) {
        unpack_lanes(sums, vectors * kWidth, lanes, group.head_dim, set1(group.scores.scale), to, group.dq_stride);
        continue;
      }
      unpack_lanes(sums, vectors * kWidth, lanes, group.head_dim, set1(group.scores.scale), turned.rows, group.head_dim);
      for (int64_t i = 0; i < lanes; ++i) turn_back(turned.rows + i * group.head_dim, group.rotate_q, n + i, group.head_dim);
      write_rows(turned.rows, group.head_dim, lanes, group.head_dim, set1(1.0f), to, group.dq_stride);
    }
  }

 private:
  template <From from>
  void weigh(Range keys, bool settled) const {
    const Weights<Maths, vectors, from> weights(scores, scratch, part * Form::kLanes, begin, end, keys, settled);
    Form::template weigh<vectors>(layout, scratch, part, keys, weights);
  }
};

template <class Form, typename T>
void differentiate(const AttentionGroupBwd& group, void* memory) {
  using Maths = typename Form::Maths;
  constexpr int pair = Maths::pair;
  constexpr int64_t kQueries = Form::kQueries, kChunk = Form::kChunk;
  const typename Form::Registers registers;
  const Scores scores(group);
  const Layout<Form> layout(group.keys, group.head_dim);
  Scratch<Form> scratch;
  const Turned<T> room(static_cast<float*>(memory) + scratch.place(layout, static_cast<float*>(memory)), group.keys, kQueries, group.head_dim);
  const Rows<T> k = turned(Rows<T>{static_cast<const T*>(group.k), group.k_stride}, group.rotate_k, 0, group.keys, group.head_dim, room.keys);
  if (pair != 1) pack_words<Maths>(k.at, k.stride, group.keys, group.head_dim, layout.keys, layout.head_words, scratch.keys);
  pack_words<Maths>(static_cast<const T*>(group.v), group.v_stride, group.keys, group.head_dim, layout.keys, layout.head_words, scratch.values);
  Form::pack_keys(layout, k.at, k.stride, group.keys, group.head_dim, scratch.key_pairs);

  // the first block writes the sums of all keys that others add to, if it sees them
  const bool whole = !scores.windowed() && group.queries > 0;
  if (!whole) {
    memset(static_cast<void*>(scratch.dk), 0, layout.keys * layout.columns * sizeof(float));
    memset(static_cast<void*>(scratch.dv), 0, layout.keys * layout.columns * sizeof(float));
  }
  for (int64_t h = 0; h < group.heads; ++h) {
    const HeadBwd<T> head{{static_cast<const T*>(group.q) + h * group.q_head_stride, group.q_stride},
                            {static_cast<const T*>(group.grad) + h * group.grad_head_stride, group.grad_stride},
                            {static_cast<const T*>(group.out) + h * group.o_head_stride, group.o_stride},
                            group.lse + h * group.lse_head_stride,
                            static_cast<T*>(group.dq) + h * group.dq_head_stride};
    for (int64_t n = 0; n < scores.without_keys(); ++n)
      memset(static_cast<void*>(head.dq + n * group.dq_stride), 0, group.head_dim * sizeof(T));
    for (int64_t begin = scores.without_keys(); begin < group.queries; begin += kQueries) {
      const int64_t queries = group.queries - begin < kQueries ? group.queries - begin : kQueries;
      const Rows<T> q = turned(head.q, group.rotate_q, begin, begin + queries, group.head_dim, room.queries);
      const Rows<T> grad{head.grad.at + begin * head.grad.stride, head.grad.stride};
      bool settled = scores.scale.before != 1;
      for (int64_t i = 0; i < kQueries; ++i) {
        const int64_t n = begin + i;
        const float lse = i < queries ? to_float(head.lse + n) : 0.0f;
        settled |= !(__builtin_fabsf(lse) <= kMaxLse<T>);
        scratch.shift[i] = lse * kLog2e;
        scratch.delta[i] = i < queries ? dot(grad.at + i * grad.stride, head.out.at + n * head.out.stride, group.head_dim) : 0.0f;
      }
      const int64_t steps = round_up(queries, Form::kStep) / pair;
      pack_rows<Maths>(q.at, q.stride, queries, group.head_dim, steps * pair, layout.columns, scratch.q_pairs);
      pack_rows<Maths>(grad.at, grad.stride, queries, group.head_dim, steps * pair, layout.columns, scratch.grad_pairs);
      // calls body with each Part of the block, and its first query's place in the block
      const auto over_parts = [&](auto body) {
        for (int64_t part = 0; part * Form::kLanes < queries; ++part) {
          const int64_t first = part * Form::kLanes, left = queries - first, count = left < Form::kLanes ? left : Form::kLanes;
          Form::over_vectors((count + kWidth - 1) / kWidth, [&](auto n) {
            body(Part<Form, decltype(n)::value, T>{group, scores, layout, scratch, part, begin + first, begin + first + count}, first);
          });
        }
      };
      over_parts([&](auto part, int64_t first) {
        part.pack({q.at + first * q.stride, q.stride}, {grad.at + first * grad.stride, grad.stride});
        if (settled) part.settle();
      });
      const Range seen = scores.seen(begin, begin + queries, Form::kStep);
      for (int64_t key = seen.begin; key < seen.end; key += kChunk) {
        const Range keys{key, seen.end - key < kChunk ? seen.end : key + kChunk};
        over_parts([&](auto part, int64_t) { part.take_chunk(keys, key == seen.begin, settled); });
        const int64_t rows = round_up(keys.end - key, Form::kKeyRows), at = key * layout.columns;
        const bool first = whole && h == 0 && begin == 0;
        Form::add_rows(rows, scratch.p, scratch.grad_pairs, layout.columns, steps, first, scratch.dv + at);
        Form::add_rows(rows, scratch.ds, scratch.q_pairs, layout.columns, steps, first, scratch.dk + at);
      }
      over_parts([&](auto part, int64_t) { part.finish(head, room); });
    }
  }
  if (group.rotate_k.cos != nullptr)
    for (int64_t n = 0; n < group.keys; ++n) turn_back(scratch.dk + n * layout.columns, group.rotate_k, n, group.head_dim);
  write_rows(scratch.dk, layout.columns, group.keys, group.head_dim, set1(group.scores.scale), static_cast<T*>(group.dk), group.dkv_stride);
  write_rows(scratch.dv, layout.columns, group.keys, group.head_dim, set1(1.0f), static_cast<T*>(group.dv), group.dkv_stride);
}

#if VLMKERN_TILES
using Bf16Form = TileForm;
#elif VLMKERN_BF16_PAIRS
using Bf16Form = VectorForm<Bf16Pairs>;
#else
using Bf16Form = VectorForm<Float32>;
#endif

template <class Form, typename T>
int64_t words_of(int64_t keys, int64_t head_dim, bool rotates) {
  return Scratch<Form>().place({keys, head_dim}, nullptr) + (rotates ? Turned<T>::words(keys, Form::kQueries, head_dim) : 0);
}

size_t scratch_bytes(DType dtype, int64_t keys, int64_t head_dim, bool rotates) {
  if (dtype == DType::bf16) return sizeof(float) * words_of<Bf16Form, bf16>(keys, head_dim, rotates);
  return sizeof(float) * words_of<VectorForm<Float32>, float>(keys, head_dim, rotates);
}

void run_group(const AttentionGroupBwd& group, void* scratch) {
  switch (group.dtype) {
    case DType::f32: return differentiate<VectorForm<Float32>, float>(group, scratch);
    case DType::bf16: return differentiate<Bf16Form, bf16>(group, scratch);
    case DType::f16: return differentiate<VectorForm<Float32>, f16>(group, scratch);
  }
}

}  // namespace

extern const AttentionBwdKernel attention_bwd_kernel{scratch_bytes, run_group};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
