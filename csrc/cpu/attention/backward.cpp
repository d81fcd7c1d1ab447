// Gradients of one head of non-causal attention by q, k and v, over one segment.
//
// With P = exp(scale * Q K^T - lse) recomputed and delta = rowsum(dO * O):
//     dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale * dS K,  dK = scale * dS^T Q.
// Where lse is so large that its rounding shows in P, a block's maxima, sums and delta are computed again: two products
// more, so 14 instead of 10 * tokens^2 * head_dim.
//
// S^T = K Q^T and dP^T = V dO^T are tiles of keys times queries in the SIMD lanes, as in forward.cpp. dQ^T = K^T dS^T
// takes dS^T as it comes, queries in the lanes; in dV = P^T dO and dK the rows of P^T and dS^T are what is broadcast,
// and channels lie in the lanes. So nothing is transposed, at the price of channels padded to whole vectors.
//
// 10 * tokens^2 * head_dim FLOPs, the exponentials once. Blocks of queries go by outside, chunks of keys inside: a
// block's weights by a chunk's keys and its sums of dQ stay in L2; the sums of dK and dV of all keys, in float32, are
// read and written once a block. Every sum is taken in one order, whatever the number of threads.
//
// bfloat16 with AVX512_BF16 multiplies pairs (of channels, keys or queries), so P and dS are rounded to bfloat16
// before their products; with AMX by tiles, see tile_gradients.h. Everything else is widened to float32.
#include "cpu/attention/attention.h"
#include "cpu/attention/gradients.h"
#include "cpu/attention/tile_gradients.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// The largest lse whose rounding to float32 stays below that of the gradients: 2^-18 and 2^-14 of a weight.
template <typename T>
constexpr float kMaxLse = sizeof(T) == sizeof(float) ? 64.0f : 1024.0f;

// P and dS of one chunk of keys and up to kLanes queries, of which `queries` are there.
template <class Form, int vectors, bool settled>
void weigh(const Layout<Form>& layout, const Scratch<Form>& scratch, int64_t part, int64_t key_begin, int64_t count, int64_t queries,
           Scale parts) {
  using Maths = typename Form::Maths;
  constexpr int64_t kRow = vectors * kWidth, kLanes = Form::kLanes, kQueries = Form::kQueries;
  const float* keys = scratch.keys + key_begin * layout.key_words;
  const float* values = scratch.values + key_begin * layout.head_words;
  const float* q = scratch.q_lanes + part * layout.head_words * kLanes;
  const float* grad = scratch.grad_lanes + part * layout.head_words * kLanes;
  const float *shifts = scratch.shift + part * kLanes, *inverse = scratch.inverse + part * kLanes, *delta = scratch.delta + part * kLanes;
  const Vec before = set1(parts.before), scale = set1(parts.after * kLog2e);
  float tile[kRows * kRow];
  const Present<vectors> present(queries);

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
        const Vec s = load(at), shift = load(shifts + j * kWidth);
        const Vec p = weight_of<Maths, settled>(s, shift, load(inverse + j * kWidth), before, scale);
        store(at, key + r < count ? present.kept(p, j) : set1(0.0f));
      }
    }
    Vec sum[kRows][vectors] = {};
    multiply<Maths, vectors>(sum, values + key * layout.head_words, layout.head_words, 1, grad, layout.head_words);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r += Maths::pair) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        const Vec shift = load(delta + j * kWidth);
        const Vec p = load(tile + r * kRow + j * kWidth), ds = present.kept(p * (sum[r][j] - shift), j);
        const int64_t at = (key + r) * kQueries + part * kLanes + j * kWidth;
        if constexpr (Maths::pair == 1) {
          store(scratch.p + at, p);
          store(scratch.ds + at, ds);
        } else {
#if VLMKERN_BF16_PAIRS
          const Vec next_p = load(tile + (r + 1) * kRow + j * kWidth), next_ds = present.kept(next_p * (sum[r + 1][j] - shift), j);
          store_halves(scratch.p + at / 2, p);
          store_halves(scratch.p + (at + kQueries) / 2, next_p);
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
  template <int vectors, bool settled>
  static void weigh(const Layout<VectorForm>& layout, const Scratch<VectorForm>& scratch, int64_t part, int64_t key, int64_t count,
                    int64_t queries, Scale scale) {
    VLMKERN_ISA::weigh<VectorForm, vectors, settled>(layout, scratch, part, key, count, queries, scale);
  }
  template <int vectors>
  static void add_dq(const Layout<VectorForm>& layout, const Scratch<VectorForm>& scratch, int64_t part, int64_t key, int64_t count) {
    add_product<Maths, vectors>(layout.channels, scratch.key_pairs + key / Maths::pair * layout.channels, 1, layout.channels,
                                ds_part(scratch, part), ds_step<VectorForm, vectors>(), (count + Maths::pair - 1) / Maths::pair, key == 0,
                                scratch.dq + part * layout.channels * kLanes, vectors * kWidth);
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
      store_n(to + n * stride + d, load(sums + n * columns + d) * factor, lanes);
    }
  }
}

// A part of a block: up to kLanes queries, with the vectors they take known to the compiler.
template <class Form, int vectors, typename T>
struct Part {
  using Maths = typename Form::Maths;

  static void pack(const AttentionHeadBwd& head, const Layout<Form>& layout, const Scratch<Form>& scratch, int64_t part, int64_t begin,
                   int64_t count) {
    const int64_t at = part * layout.head_words * Form::kLanes;
    pack_block<Maths, vectors>(static_cast<const T*>(head.q) + begin * head.q_stride, head.q_stride, count, head.head_dim, layout.head_words,
                               scratch.rows, scratch.q_lanes + at, head.scale < 0 ? Maths::sign_bits : 0);
    pack_block<Maths, vectors>(static_cast<const T*>(head.grad) + begin * head.grad_stride, head.grad_stride, count, head.head_dim,
                               layout.head_words, scratch.rows, scratch.grad_lanes + at, 0);
  }
  static void settle(const Layout<Form>& layout, const Scratch<Form>& scratch, int64_t part, int64_t tokens, Scale scale) {
    VLMKERN_ISA::settle<Form, vectors>(layout, scratch, part, tokens, scale);
  }
  static void take_chunk(const Layout<Form>& layout, const Scratch<Form>& scratch, int64_t part, int64_t key, int64_t count,
                         int64_t queries, Scale scale, bool settled) {
    if (settled)
      Form::template weigh<vectors, true>(layout, scratch, part, key, count, queries, scale);
    else
      Form::template weigh<vectors, false>(layout, scratch, part, key, count, queries, scale);
    Form::template add_dq<vectors>(layout, scratch, part, key, count);
  }
  static void finish(const AttentionHeadBwd& head, const Layout<Form>& layout, const Scratch<Form>& scratch, int64_t part, int64_t begin,
                     int64_t count) {
    for (int64_t j = 0; j * kWidth < count; ++j)
      unpack_lanes(scratch.dq + part * layout.channels * Form::kLanes + j * kWidth, vectors * kWidth,
                   count - j * kWidth < kWidth ? count - j * kWidth : kWidth, head.head_dim, set1(head.scale),
                   static_cast<T*>(head.dq) + (begin + j * kWidth) * head.out_stride, head.out_stride);
  }
};

// Calls body with the Part of each kLanes of `queries`, its index, and its first query and their number.
template <class Form, typename T, typename Body>
void over_parts(int64_t queries, Body body) {
  for (int64_t part = 0; part * Form::kLanes < queries; ++part) {
    const int64_t left = queries - part * Form::kLanes, count = left < Form::kLanes ? left : Form::kLanes;
    Form::over_vectors((count + kWidth - 1) / kWidth,
                       [&](auto n) { body(Part<Form, decltype(n)::value, T>(), part, part * Form::kLanes, count); });
  }
}

template <class Form, typename T>
void differentiate(const AttentionHeadBwd& head, void* memory) {
  using Maths = typename Form::Maths;
  constexpr int pair = Maths::pair;
  constexpr int64_t kQueries = Form::kQueries, kChunk = Form::kChunk;
  const typename Form::Registers registers;
  const Layout<Form> layout(head.tokens, head.head_dim);
  Scratch<Form> scratch;
  scratch.place(layout, static_cast<float*>(memory));
  const T *q = static_cast<const T*>(head.q), *k = static_cast<const T*>(head.k), *v = static_cast<const T*>(head.v);
  const T *grad = static_cast<const T*>(head.grad), *out = static_cast<const T*>(head.out);
  if (pair != 1) pack_words<Maths>(k, head.k_stride, head.tokens, head.head_dim, layout.keys, layout.head_words, scratch.keys);
  pack_words<Maths>(v, head.v_stride, head.tokens, head.head_dim, layout.keys, layout.head_words, scratch.values);
  Form::pack_keys(layout, k, head.k_stride, head.tokens, head.head_dim, scratch.key_pairs);

  // a negative scale moves its sign to the queries, as maxima are taken before scaling
  const Scale scale(head.scale < 0 ? -head.scale : head.scale);
  for (int64_t begin = 0; begin < head.tokens; begin += kQueries) {
    const int64_t queries = head.tokens - begin < kQueries ? head.tokens - begin : kQueries;
    bool settled = scale.before != 1;
    for (int64_t i = 0; i < kQueries; ++i) {
      const int64_t n = begin + i;
      const float lse = i < queries ? to_float(head.lse + n) : 0.0f;
      settled |= !(__builtin_fabsf(lse) <= kMaxLse<T>);
      scratch.shift[i] = lse * kLog2e;
      scratch.delta[i] = i < queries ? dot(grad + n * head.grad_stride, out + n * head.o_stride, head.head_dim) : 0.0f;
    }
    const int64_t steps = round_up(queries, Form::kStep) / pair;
    pack_rows<Maths>(q + begin * head.q_stride, head.q_stride, queries, head.head_dim, steps * pair, layout.columns, scratch.q_pairs);
    pack_rows<Maths>(grad + begin * head.grad_stride, head.grad_stride, queries, head.head_dim, steps * pair, layout.columns,
                     scratch.grad_pairs);
    over_parts<Form, T>(queries, [&](auto kernel, int64_t part, int64_t first, int64_t count) {
      kernel.pack(head, layout, scratch, part, begin + first, count);
      if (settled) kernel.settle(layout, scratch, part, head.tokens, scale);
    });
    for (int64_t key = 0; key < head.tokens; key += kChunk) {
      const int64_t keys = head.tokens - key < kChunk ? head.tokens - key : kChunk;
      over_parts<Form, T>(queries, [&](auto kernel, int64_t part, int64_t, int64_t count) {
        kernel.take_chunk(layout, scratch, part, key, keys, count, scale, settled);
      });
      const int64_t rows = round_up(keys, Form::kKeyRows), at = key * layout.columns;
      Form::add_rows(rows, scratch.p, scratch.grad_pairs, layout.columns, steps, begin == 0, scratch.dv + at);
      Form::add_rows(rows, scratch.ds, scratch.q_pairs, layout.columns, steps, begin == 0, scratch.dk + at);
    }
    over_parts<Form, T>(queries, [&](auto kernel, int64_t part, int64_t first, int64_t count) {
      kernel.finish(head, layout, scratch, part, begin + first, count);
    });
  }
  write_rows(scratch.dk, layout.columns, head.tokens, head.head_dim, set1(head.scale), static_cast<T*>(head.dk), head.out_stride);
  write_rows(scratch.dv, layout.columns, head.tokens, head.head_dim, set1(1.0f), static_cast<T*>(head.dv), head.out_stride);
}

#if VLMKERN_TILES
using Bf16Form = TileForm;
#elif VLMKERN_BF16_PAIRS
using Bf16Form = VectorForm<Bf16Pairs>;
#else
using Bf16Form = VectorForm<Float32>;
#endif

template <class Form>
int64_t words_of(int64_t tokens, int64_t head_dim) {
  return Scratch<Form>().place({tokens, head_dim}, nullptr);
}

size_t scratch_bytes(DType dtype, int64_t tokens, int64_t head_dim) {
  return sizeof(float) * (dtype == DType::bf16 ? words_of<Bf16Form>(tokens, head_dim) : words_of<VectorForm<Float32>>(tokens, head_dim));
}

void run_head(const AttentionHeadBwd& head, void* scratch) {
  switch (head.dtype) {
    case DType::f32: return differentiate<VectorForm<Float32>, float>(head, scratch);
    case DType::bf16: return differentiate<Bf16Form, bf16>(head, scratch);
    case DType::f16: return differentiate<VectorForm<Float32>, f16>(head, scratch);
  }
}

}  // namespace

extern const AttentionBwdKernel attention_bwd_kernel{scratch_bytes, run_head};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
