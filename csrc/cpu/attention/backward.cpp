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
// before their products; everything else is widened to float32.
#include "cpu/attention/attention.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

constexpr int kLanes = kMaxVectors * kWidth;
// of queries and keys; 1 to 8 times kLanes by 32 to 256 keys take the same time within 6 % on Zen 5
constexpr int kQueries = 3 * kLanes;
constexpr int kChunk = 96;

// The largest lse whose rounding to float32 stays below that of the gradients: 2^-18 and 2^-14 of a weight.
template <typename T>
constexpr float kMaxLse = sizeof(T) == sizeof(float) ? 64.0f : 1024.0f;

// Everything below counts in 32-bit words: a float32, or a pair of bfloat16.
template <class Maths>
struct Layout {
  // words of a row of q, k, v or grad; channels padded for rows and for lanes; padded keys; words between keys
  int64_t head_words, channels, columns, keys, key_words;
  Layout(int64_t tokens, int64_t head_dim)
      : head_words((head_dim + Maths::pair - 1) / Maths::pair), channels(round_up(head_dim, kGroup)), columns(round_up(head_dim, kWidth)),
        keys(round_up(tokens, kGroup)), key_words(Maths::pair == 1 ? channels : head_words) {}
};

constexpr int64_t kWeightRow(int pair) { return kQueries / pair; }

template <class Maths>
struct Scratch {
  float *key_pairs, *keys, *values;                     // k by pairs of keys; k and v row by row
  float *q_lanes, *grad_lanes, *q_pairs, *grad_pairs;   // of a block of queries: in the lanes, and by pairs of queries
  float *rows;
  float *p, *ds, *ds_lanes;                             // [key][query], and ds by pairs of keys
  float *dq, *dk, *dv;
  // of a block's queries: lse in units of ln 2, or the largest score and one over the sum of the weights; delta
  float *shift, *inverse, *delta;

  // returns the words taken
  int64_t place(const Layout<Maths>& layout, float* memory) {
    constexpr int pair = Maths::pair;
    int64_t taken = 0;
    auto take = [&](int64_t words) {
      float* here = memory == nullptr ? nullptr : memory + taken;
      taken += round_up(words, 16);  // each part starts on a cache line
      return here;
    };
    key_pairs = take(layout.keys / pair * layout.channels);
    keys = pair == 1 ? key_pairs : take(layout.keys * layout.head_words);
    values = take(layout.keys * layout.head_words);
    q_lanes = take(layout.head_words * kQueries);
    grad_lanes = take(layout.head_words * kQueries);
    q_pairs = take(kQueries / pair * layout.columns);
    grad_pairs = take(kQueries / pair * layout.columns);
    rows = take(kWidth * layout.head_words);
    p = take(kChunk * kWeightRow(pair));
    ds = take(kChunk * kWeightRow(pair));
    ds_lanes = pair == 1 ? ds : take(kChunk / pair * kQueries);
    dq = take(layout.channels * kQueries);
    dk = take(layout.keys * layout.columns);
    dv = take(layout.keys * layout.columns);
    shift = take(kQueries);
    inverse = take(kQueries);
    delta = take(kQueries);
    return taken;
  }
};

// Where a block's part for kLanes of its queries begins, and the words between its keys (or pairs of keys).
template <class Maths>
float* ds_part(const Scratch<Maths>& scratch, int64_t part) {
  return scratch.ds_lanes + part * (Maths::pair == 1 ? kLanes : kChunk / Maths::pair * kLanes);
}
template <class Maths, int vectors>
constexpr int64_t ds_step() {
  return Maths::pair == 1 ? kQueries : vectors * kWidth;
}

// The largest score, one over the sum of the weights, and delta of up to kLanes queries, all from q, k, v and grad. With
// delta summed like P * dO V^T, a query that sees one key alone has a dS of zero, as it should.
template <class Maths, int vectors>
void settle(const Layout<Maths>& layout, const Scratch<Maths>& scratch, int64_t part, int64_t tokens, Scale scale) {
  const float* q = scratch.q_lanes + part * layout.head_words * kLanes;
  const float* grad = scratch.grad_lanes + part * layout.head_words * kLanes;
  const Vec before = set1(scale.before), after = set1(scale.after * kLog2e);
  Vec highest[vectors], total[vectors], delta[vectors];
  for (int j = 0; j < vectors; ++j) highest[j] = set1(-kInfinity), total[j] = delta[j] = set1(0.0f);
  for (int64_t key = 0; key < tokens; key += kRows) {
    const int rows = int(tokens - key < kRows ? tokens - key : kRows);
    Vec s[kRows][vectors] = {}, dp[kRows][vectors] = {};
    multiply<Maths, vectors>(s, scratch.keys + key * layout.key_words, layout.key_words, 1, q, layout.head_words);
    multiply<Maths, vectors>(dp, scratch.values + key * layout.head_words, layout.head_words, 1, grad, layout.head_words);
    for (int j = 0; j < vectors; ++j) {
      Vec top = highest[j];
      for (int r = 0; r < rows; ++r) top = max(top, s[r][j] * before);
      // while every score is -inf there is no maximum to subtract, and -inf less -inf would be NaN
      const Vec shift = select_equal(top, set1(-kInfinity), set1(0.0f), top);
      const Vec rescale = exp2_nonpositive<6>((highest[j] - shift) * after);
      total[j] = total[j] * rescale, delta[j] = delta[j] * rescale, highest[j] = top;
      for (int r = 0; r < rows; ++r) {
        const Vec p = exp2_nonpositive<Maths::exp2_degree>((s[r][j] * before - shift) * after);
        total[j] = total[j] + p, delta[j] = fma(p, dp[r][j], delta[j]);
      }
    }
  }
  for (int j = 0; j < vectors; ++j) {
    const int64_t at = part * kLanes + j * kWidth;
    store(scratch.shift + at, highest[j]);
    store(scratch.inverse + at, set1(1.0f) / total[j]);
    store(scratch.delta + at, delta[j] / total[j]);
  }
}

// P and dS of one chunk of keys and up to kLanes queries, of which `queries` are there.
template <class Maths, int vectors, bool settled>
void weigh(const Layout<Maths>& layout, const Scratch<Maths>& scratch, int64_t part, int64_t key_begin, int64_t count, int64_t queries,
           Scale parts) {
  constexpr int64_t kRow = vectors * kWidth;
  const float* keys = scratch.keys + key_begin * layout.key_words;
  const float* values = scratch.values + key_begin * layout.head_words;
  const float* q = scratch.q_lanes + part * layout.head_words * kLanes;
  const float* grad = scratch.grad_lanes + part * layout.head_words * kLanes;
  const float *shifts = scratch.shift + part * kLanes, *inverse = scratch.inverse + part * kLanes, *delta = scratch.delta + part * kLanes;
  const Vec before = set1(parts.before), scale = set1(parts.after * kLog2e);
  float one[kRow], tile[kRows * kRow];
  for (int64_t i = 0; i < kRow; ++i) one[i] = i < queries ? 1.0f : 0.0f;
  const bool partial = queries < kRow;
  // lanes without a query have weight 0 even where a key is not finite
  auto kept = [&](Vec x, int j) { return partial ? select_equal(load(one + j * kWidth), set1(0.0f), set1(0.0f), x) : x; };

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
        Vec p;
        if constexpr (settled) {
          p = exp2_nonpositive<Maths::exp2_degree>((s * before - shift) * scale) * load(inverse + j * kWidth);
        } else {
          // a score is at most its row's log-sum-exp but for rounding
          p = exp2_nonpositive<Maths::exp2_degree>(min(set1(0.0f), fma(s, scale, set1(0.0f) - shift)));
        }
        store(at, key + r < count ? kept(p, j) : set1(0.0f));
      }
    }
    Vec sum[kRows][vectors] = {};
    multiply<Maths, vectors>(sum, values + key * layout.head_words, layout.head_words, 1, grad, layout.head_words);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r += Maths::pair) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        const Vec shift = load(delta + j * kWidth);
        const Vec p = load(tile + r * kRow + j * kWidth), ds = kept(p * (sum[r][j] - shift), j);
        const int64_t at = (key + r) * kQueries + part * kLanes + j * kWidth;
        if constexpr (Maths::pair == 1) {
          store(scratch.p + at, p);
          store(scratch.ds + at, ds);
        } else {
#if VLMKERN_BF16_PAIRS
          const Vec next_p = load(tile + (r + 1) * kRow + j * kWidth), next_ds = kept(next_p * (sum[r + 1][j] - shift), j);
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
void add_rows(int64_t rows, const float* weights, const float* b, int64_t columns, int64_t steps, bool first, float* sums) {
  for (int64_t c = 0; c < columns;) {
    const int64_t left = (columns - c) / kWidth;
    // four vectors go as two and two: a tile of one has too few sums to hide the latency of an add
    const int vectors = left == 4 ? 2 : int(left < kMaxVectors ? left : kMaxVectors);
    const int64_t a_row = kWeightRow(Maths::pair);
    switch (vectors) {
      case 1: add_product<Maths, 1>(rows, weights, a_row, 1, b + c, columns, steps, first, sums + c, columns); break;
      case 2: add_product<Maths, 2>(rows, weights, a_row, 1, b + c, columns, steps, first, sums + c, columns); break;
      default: add_product<Maths, 3>(rows, weights, a_row, 1, b + c, columns, steps, first, sums + c, columns); break;
    }
    c += vectors * kWidth;
  }
}

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
template <class Maths, int vectors, typename T>
struct Part {
  static void pack(const AttentionHeadBwd& head, const Layout<Maths>& layout, const Scratch<Maths>& scratch, int64_t part, int64_t begin,
                   int64_t count) {
    const int64_t at = part * layout.head_words * kLanes;
    pack_block<Maths, vectors>(static_cast<const T*>(head.q) + begin * head.q_stride, head.q_stride, count, head.head_dim, layout.head_words,
                               scratch.rows, scratch.q_lanes + at, head.scale < 0 ? Maths::sign_bits : 0);
    pack_block<Maths, vectors>(static_cast<const T*>(head.grad) + begin * head.grad_stride, head.grad_stride, count, head.head_dim,
                               layout.head_words, scratch.rows, scratch.grad_lanes + at, 0);
  }
  static void settle(const Layout<Maths>& layout, const Scratch<Maths>& scratch, int64_t part, int64_t tokens, Scale scale) {
    VLMKERN_ISA::settle<Maths, vectors>(layout, scratch, part, tokens, scale);
  }
  static void take_chunk(const Layout<Maths>& layout, const Scratch<Maths>& scratch, int64_t part, int64_t key, int64_t count,
                         int64_t queries, Scale scale, bool settled) {
    if (settled)
      weigh<Maths, vectors, true>(layout, scratch, part, key, count, queries, scale);
    else
      weigh<Maths, vectors, false>(layout, scratch, part, key, count, queries, scale);
    add_product<Maths, vectors>(layout.channels, scratch.key_pairs + key / Maths::pair * layout.channels, 1, layout.channels,
                                ds_part(scratch, part), ds_step<Maths, vectors>(), (count + Maths::pair - 1) / Maths::pair, key == 0,
                                scratch.dq + part * layout.channels * kLanes, vectors * kWidth);
  }
  static void finish(const AttentionHeadBwd& head, const Layout<Maths>& layout, const Scratch<Maths>& scratch, int64_t part, int64_t begin,
                     int64_t count) {
    for (int64_t j = 0; j * kWidth < count; ++j)
      unpack_lanes(scratch.dq + part * layout.channels * kLanes + j * kWidth, vectors * kWidth,
                   count - j * kWidth < kWidth ? count - j * kWidth : kWidth, head.head_dim, set1(head.scale),
                   static_cast<T*>(head.dq) + (begin + j * kWidth) * head.out_stride, head.out_stride);
  }
};

// Calls body with the Part of each kLanes of `queries`, its index, and its first query and their number.
template <class Maths, typename T, typename Body>
void over_parts(int64_t queries, Body body) {
  for (int64_t part = 0; part * kLanes < queries; ++part) {
    const int64_t left = queries - part * kLanes, count = left < kLanes ? left : kLanes;
    switch ((count + kWidth - 1) / kWidth) {
      case 1: body(Part<Maths, 1, T>(), part, part * kLanes, count); break;
      case 2: body(Part<Maths, 2, T>(), part, part * kLanes, count); break;
      default: body(Part<Maths, 3, T>(), part, part * kLanes, count); break;
    }
  }
}

template <class Maths, typename T>
void differentiate(const AttentionHeadBwd& head, void* memory) {
  constexpr int pair = Maths::pair;
  const Layout<Maths> layout(head.tokens, head.head_dim);
  Scratch<Maths> scratch;
  scratch.place(layout, static_cast<float*>(memory));
  const T *q = static_cast<const T*>(head.q), *k = static_cast<const T*>(head.k), *v = static_cast<const T*>(head.v);
  const T *grad = static_cast<const T*>(head.grad), *out = static_cast<const T*>(head.out);
  if (pair != 1) pack_words<Maths>(k, head.k_stride, head.tokens, head.head_dim, layout.keys, layout.head_words, scratch.keys);
  pack_words<Maths>(v, head.v_stride, head.tokens, head.head_dim, layout.keys, layout.head_words, scratch.values);
  pack_rows<Maths>(k, head.k_stride, head.tokens, head.head_dim, layout.keys, layout.channels, scratch.key_pairs);

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
    const int64_t steps = (queries + pair - 1) / pair;
    pack_rows<Maths>(q + begin * head.q_stride, head.q_stride, queries, head.head_dim, steps * pair, layout.columns, scratch.q_pairs);
    pack_rows<Maths>(grad + begin * head.grad_stride, head.grad_stride, queries, head.head_dim, steps * pair, layout.columns,
                     scratch.grad_pairs);
    over_parts<Maths, T>(queries, [&](auto kernel, int64_t part, int64_t first, int64_t count) {
      kernel.pack(head, layout, scratch, part, begin + first, count);
      if (settled) kernel.settle(layout, scratch, part, head.tokens, scale);
    });
    for (int64_t key = 0; key < head.tokens; key += kChunk) {
      const int64_t keys = head.tokens - key < kChunk ? head.tokens - key : kChunk;
      over_parts<Maths, T>(queries, [&](auto kernel, int64_t part, int64_t, int64_t count) {
        kernel.take_chunk(layout, scratch, part, key, keys, count, scale, settled);
      });
      const int64_t rows = round_up(keys, kRows), at = key * layout.columns;
      add_rows<Maths>(rows, scratch.p, scratch.grad_pairs, layout.columns, steps, begin == 0, scratch.dv + at);
      add_rows<Maths>(rows, scratch.ds, scratch.q_pairs, layout.columns, steps, begin == 0, scratch.dk + at);
    }
    over_parts<Maths, T>(queries, [&](auto kernel, int64_t part, int64_t first, int64_t count) {
      kernel.finish(head, layout, scratch, part, begin + first, count);
    });
  }
  write_rows(scratch.dk, layout.columns, head.tokens, head.head_dim, set1(head.scale), static_cast<T*>(head.dk), head.out_stride);
  write_rows(scratch.dv, layout.columns, head.tokens, head.head_dim, set1(1.0f), static_cast<T*>(head.dv), head.out_stride);
}

size_t scratch_bytes(DType dtype, int64_t tokens, int64_t head_dim) {
#if VLMKERN_BF16_PAIRS
  if (dtype == DType::bf16) return Scratch<Bf16Pairs>().place({tokens, head_dim}, nullptr) * sizeof(float);
#endif
  (void)dtype;
  return Scratch<Float32>().place({tokens, head_dim}, nullptr) * sizeof(float);
}

void run_head(const AttentionHeadBwd& head, void* scratch) {
  switch (head.dtype) {
    case DType::f32: return differentiate<Float32, float>(head, scratch);
#if VLMKERN_BF16_PAIRS
    case DType::bf16: return differentiate<Bf16Pairs, bf16>(head, scratch);
#else
    case DType::bf16: return differentiate<Float32, bf16>(head, scratch);
#endif
    case DType::f16: return differentiate<Float32, f16>(head, scratch);
  }
}

}  // namespace

extern const AttentionBwdKernel attention_bwd_kernel{scratch_bytes, run_head};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
