// Non-causal attention of one head: softmax(scale * Q K^T) V over one segment, with online softmax.
//
// Queries lie in the SIMD lanes: S^T = K Q^T and O^T = V^T P^T are computed as tiles of 8 rows (keys, then channels)
// times up to three vectors of queries, so the head dimension is only ever broadcast. It needs no padding to a
// vector's width (72 = 9 * 8), and maximum, exponential and sum run down the lanes without a horizontal step.
//
// Per (head, block of queries): 4 * tokens * queries * head_dim FLOPs. Scratch traffic stays in L1 and L2: keys go by
// in chunks, and a chunk's scores, the block's queries and its output sums are 50 KB at D = 72.
//
// bfloat16 with AVX512_BF16 multiplies pairs of neighbours (along the head dimension, then along the keys) with
// vdpbf16ps; everything else is widened to float32 when packed. Sums, scores and softmax are float32 throughout.
#include "cpu/attention/attention.h"

#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

constexpr int kChunk = 256;    // keys per online-softmax step; bf16 at D = 72 on Zen 5: 128 keys 377 GFLOP/s, 256 412, 384 411

// Everything below counts in 32-bit words: a float32, or a pair of bfloat16.
template <class Maths>
struct Layout {
  int64_t head_words, channels, keys;  // words of a q or k row; padded channels; padded keys
  explicit Layout(int64_t tokens, int64_t head_dim)
      : head_words((head_dim + Maths::pair - 1) / Maths::pair), channels(round_up(head_dim, kGroup)), keys(round_up(tokens, kGroup)) {}

  static constexpr int64_t kBlock = kMaxVectors * kWidth;
  int64_t k_words() const { return keys * head_words; }
  int64_t v_words() const { return keys / Maths::pair * channels; }
  int64_t q_words() const { return head_words * kBlock; }
  int64_t rows_words() const { return round_up(kWidth * head_words, 16); }
  int64_t s_words() const { return kChunk * kBlock; }
  int64_t p_words() const { return Maths::pair == 1 ? 0 : kChunk / Maths::pair * kBlock; }
  int64_t o_words() const { return channels * kBlock; }
};

template <class Maths>
struct Scratch {
  float *k, *v, *q, *rows, *s, *p, *o;
  Scratch(const Layout<Maths>& layout, void* memory) {
    float* next = static_cast<float*>(memory);
    auto take = [&](int64_t words) {
      float* here = next;
      next += round_up(words, 16);  // each part starts on a cache line
      return here;
    };
    k = take(layout.k_words());
    v = take(layout.v_words());
    q = take(layout.q_words());
    rows = take(layout.rows_words());
    s = take(layout.s_words());
    p = Maths::pair == 1 ? s : take(layout.p_words());
    o = take(layout.o_words());
  }
  static int64_t words(const Layout<Maths>& layout) {
    return layout.k_words() + layout.v_words() + layout.q_words() + layout.rows_words() + layout.s_words() + layout.p_words() +
           layout.o_words() + 7 * 16;
  }
};

// Unscaled scores of `count` keys (any number up to kChunk) against the block; highest[j] takes in their maximum.
template <class Maths, int vectors>
void score(const float* k, int64_t head_words, int64_t count, const float* q, float* s, Vec (&highest)[vectors]) {
  for (int64_t key = 0; key < count; key += kRows) {
    Vec sum[kRows][vectors] = {};
    multiply<Maths, vectors>(sum, k + key * head_words, head_words, 1, q, head_words);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        const Vec x = key + r < count ? sum[r][j] : set1(-kInfinity);
        highest[j] = max(highest[j], x);
        store(s + ((key + r) * vectors + j) * kWidth, x);
      }
    }
  }
}

// The scores times a factor, and highest[j] anew.
template <int vectors>
void rescale_scores(float* s, int64_t count, Vec factor, Vec (&highest)[vectors]) {
  for (int64_t key = 0; key < count; ++key) {
    for (int j = 0; j < vectors; ++j) {
      float* at = s + (key * vectors + j) * kWidth;
      const Vec x = load(at) * factor;
      highest[j] = max(highest[j], x);
      store(at, x);
    }
  }
}

// p = 2^(scale * (s - shift)), in the layout of the second product; sum[j] takes in the weights as they were rounded.
// The difference comes first, as it is exact where it matters; scale * shift, rounded, is off by 64 when it is 1e9.
template <class Maths, int vectors>
void exponentiate(const float* s, int64_t count, Vec scale, const Vec (&shift)[vectors], float* p, Vec (&sum)[vectors]) {
  for (int64_t key = 0; key < count; key += Maths::pair) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) {
      const float* from = s + (key * vectors + j) * kWidth;
      const Vec first = exp2_nonpositive<Maths::exp2_degree>((load(from) - shift[j]) * scale);
      float* to = p + (key / Maths::pair * vectors + j) * kWidth;
      if constexpr (Maths::pair == 1) {
        sum[j] = sum[j] + first;
        store(to, first);
      } else {
#if defined(__AVX512BF16__)
        // a key beyond the last one was scored -inf, so its weight is 0
        const Vec second = exp2_nonpositive<Maths::exp2_degree>((load(from + vectors * kWidth) - shift[j]) * scale);
        const Vec words = interleave(first, second);
        sum[j] = Maths::multiply_add(words, Vec{_mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80))}, sum[j]);
        store(to, words);
#endif
      }
    }
  }
}

// o[channel][lanes] = o * rescale + V^T P^T over one chunk of keys
template <class Maths, int vectors>
void accumulate(const float* v, int64_t channels, int64_t steps, const float* p, bool first, const Vec (&rescale)[vectors], float* o) {
  for (int64_t c = 0; c < channels; c += kRows) {
    Vec sum[kRows][vectors] = {};
    float* here = o + c * vectors * kWidth;
    multiply<Maths, vectors>(sum, v + c, 1, channels, p, steps);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) {
        float* to = here + (r * vectors + j) * kWidth;
        // each chunk is summed apart and then added: rounding grows with the chunk's length, not the segment's
        store(to, first ? sum[r][j] : fma(load(to), rescale[j], sum[r][j]));
      }
    }
  }
}

// The block's output rows and log-sum-exps from the sums, [channels][vectors][lanes].
template <int vectors, typename T>
void finish(const AttentionHead& head, int64_t begin, int64_t count, const float* o, Vec scale, const Vec (&highest)[vectors],
            const Vec (&sum)[vectors]) {
  for (int j = 0; j < vectors; ++j) {
    const int64_t lanes = count - j * kWidth < kWidth ? count - j * kWidth : kWidth;
    if (lanes <= 0) return;
    const Vec inverse = set1(1.0f) / sum[j];
    unpack_lanes(o + j * kWidth, vectors * kWidth, lanes, head.head_dim, inverse,
                 static_cast<T*>(head.out) + (begin + j * kWidth) * head.out_stride, head.out_stride);
    float top[kWidth], total[kWidth];
    store(top, highest[j] * scale);
    store(total, sum[j]);
    for (int64_t i = 0; i < lanes; ++i) top[i] += __builtin_logf(total[i]);
    store_n(head.lse + begin + j * kWidth, load(top), int(lanes));
  }
}

template <class Maths, int vectors, typename T>
void attend_block(const AttentionHead& head, const Layout<Maths>& layout, const Scratch<Maths>& scratch, int64_t begin, int64_t end) {
  // the maximum is taken before scaling, so a negative scale moves its sign to the queries
  pack_block<Maths, vectors>(static_cast<const T*>(head.q) + begin * head.q_stride, head.q_stride, end - begin, head.head_dim,
                             layout.head_words, scratch.rows, scratch.q, head.scale < 0 ? Maths::sign_bits : 0);
  const Scale parts(head.scale < 0 ? -head.scale : head.scale);
  const Vec scale = set1(parts.after * kLog2e);

  Vec highest[vectors], sum[vectors];
  for (int j = 0; j < vectors; ++j) highest[j] = set1(-kInfinity), sum[j] = set1(0.0f);
  for (int64_t key = 0; key < head.tokens; key += kChunk) {
    const int64_t count = head.tokens - key < kChunk ? head.tokens - key : kChunk;
    Vec next[vectors], shift[vectors], rescale[vectors];
    for (int j = 0; j < vectors; ++j) next[j] = highest[j];
    score<Maths, vectors>(scratch.k + key * layout.head_words, layout.head_words, count, scratch.q, scratch.s, next);
    if (parts.before != 1) {
      for (int j = 0; j < vectors; ++j) next[j] = highest[j];
      rescale_scores<vectors>(scratch.s, count, set1(parts.before), next);
    }
    for (int j = 0; j < vectors; ++j) {
      // while every score is -inf there is no maximum to subtract, and -inf less -inf would be NaN
      shift[j] = select_equal(next[j], set1(-kInfinity), set1(0.0f), next[j]);
      rescale[j] = exp2_nonpositive<6>((highest[j] - shift[j]) * scale);
      highest[j] = next[j];
    }
    Vec chunk_sum[vectors] = {};
    exponentiate<Maths, vectors>(scratch.s, count, scale, shift, scratch.p, chunk_sum);
    for (int j = 0; j < vectors; ++j) sum[j] = fma(sum[j], rescale[j], chunk_sum[j]);
    accumulate<Maths, vectors>(scratch.v + key / Maths::pair * layout.channels, layout.channels, (count + Maths::pair - 1) / Maths::pair,
                               scratch.p, key == 0, rescale, scratch.o);
  }
  finish<vectors, T>(head, begin, end - begin, scratch.o, set1(parts.after), highest, sum);
}

template <class Maths, typename T>
void attend(const AttentionHead& head, void* memory) {
  const Layout<Maths> layout(head.tokens, head.head_dim);
  const Scratch<Maths> scratch(layout, memory);
  pack_words<Maths>(static_cast<const T*>(head.k), head.k_stride, head.tokens, head.head_dim, layout.keys, layout.head_words, scratch.k);
  pack_rows<Maths>(static_cast<const T*>(head.v), head.v_stride, head.tokens, head.head_dim, layout.keys, layout.channels, scratch.v);

  int64_t begin = head.query_begin;
  while (begin < head.query_end) {
    // a remainder of four vectors goes as two and two: a tile of one has too few sums to hide the latency of an add
    const int64_t left = (head.query_end - begin + kWidth - 1) / kWidth;
    const int vectors = left == 4 ? 2 : int(left < kMaxVectors ? left : kMaxVectors);
    const int64_t end = begin + vectors * kWidth < head.query_end ? begin + vectors * kWidth : head.query_end;
    switch (vectors) {
      case 1: attend_block<Maths, 1, T>(head, layout, scratch, begin, end); break;
      case 2: attend_block<Maths, 2, T>(head, layout, scratch, begin, end); break;
      default: attend_block<Maths, 3, T>(head, layout, scratch, begin, end); break;
    }
    begin = end;
  }
}

size_t scratch_bytes(DType dtype, int64_t tokens, int64_t head_dim) {
#if defined(__AVX512BF16__)
  if (dtype == DType::bf16) return Scratch<Bf16Pairs>::words(Layout<Bf16Pairs>(tokens, head_dim)) * sizeof(float);
#endif
  (void)dtype;
  return Scratch<Float32>::words(Layout<Float32>(tokens, head_dim)) * sizeof(float);
}

void run_head(const AttentionHead& head, void* scratch) {
  switch (head.dtype) {
    case DType::f32: return attend<Float32, float>(head, scratch);
#if defined(__AVX512BF16__)
    case DType::bf16: return attend<Bf16Pairs, bf16>(head, scratch);
#else
    case DType::bf16: return attend<Float32, bf16>(head, scratch);
#endif
    case DType::f16: return attend<Float32, f16>(head, scratch);
  }
}

}  // namespace

extern const AttentionFwdKernel attention_fwd_kernel{scratch_bytes, run_head};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
