// The online softmax of attention's forward, over products that vectors or tiles compute: softmax(scale * Q K^T) V of one head.
//
// Queries lie in the SIMD lanes, so maximum, exponential and sum run down the lanes without a horizontal step. Keys go by in
// chunks; for each, scores are made, and the weights that come of them added to the sums (Milakov and Gimelshein, 2018).
//
// `Products` packs operands into scratch and multiplies:
//     Maths, kChunk               float32 or pairs of bfloat16; keys per chunk
//     Registers                   what a thread must hold while it multiplies
//     words(tokens, head_dim)     32-bit words of scratch
//     pack_keys<T>(head)          keys and values of the segment
//     over_vectors(n, body)       calls body with the vectors of a block, an Int, where n are left
//     pack_queries<v, T>(...)     a block's queries
//     score<v>(key, count, top)   s [padded count][v][lane], unscaled, -inf beyond count, and their maximum
//     accumulate<v>(...)          o [channel][v][lane] = o * rescale + V^T P^T
//     s, p, o                     p [padded count / pair][v][lane]
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

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
#if VLMKERN_BF16_PAIRS
        // a key beyond the last one was scored -inf, so its weight is 0
        const Vec second = exp2_nonpositive<Maths::exp2_degree>((load(from + vectors * kWidth) - shift[j]) * scale);
        const Vec words = interleave(first, second);
        sum[j] = Maths::multiply_add(words, ones_of_pairs(), sum[j]);
        store(to, words);
#endif
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

template <int vectors, typename T, class Products>
void attend_block(const AttentionHead& head, const Products& products, int64_t begin, int64_t end) {
  using Maths = typename Products::Maths;
  // the maximum is taken before scaling, so a negative scale moves its sign to the queries
  products.template pack_queries<vectors>(static_cast<const T*>(head.q) + begin * head.q_stride, head.q_stride, end - begin,
                                          head.scale < 0 ? Maths::sign_bits : 0);
  const Scale parts(head.scale < 0 ? -head.scale : head.scale);
  const Vec scale = set1(parts.after * kLog2e);

  Vec highest[vectors], sum[vectors];
  for (int j = 0; j < vectors; ++j) highest[j] = set1(-kInfinity), sum[j] = set1(0.0f);
  for (int64_t key = 0; key < head.tokens; key += Products::kChunk) {
    const int64_t count = head.tokens - key < Products::kChunk ? head.tokens - key : Products::kChunk;
    Vec next[vectors], shift[vectors], rescale[vectors];
    for (int j = 0; j < vectors; ++j) next[j] = highest[j];
    products.template score<vectors>(key, count, next);
    if (parts.before != 1) {
      for (int j = 0; j < vectors; ++j) next[j] = highest[j];
      rescale_scores<vectors>(products.s, count, set1(parts.before), next);
    }
    for (int j = 0; j < vectors; ++j) {
      // while every score is -inf there is no maximum to subtract, and -inf less -inf would be NaN
      shift[j] = select_equal(next[j], set1(-kInfinity), set1(0.0f), next[j]);
      rescale[j] = exp2_nonpositive<6>((highest[j] - shift[j]) * scale);
      highest[j] = next[j];
    }
    Vec chunk_sum[vectors] = {};
    exponentiate<Maths, vectors>(products.s, Products::padded(count), scale, shift, products.p, chunk_sum);
    for (int j = 0; j < vectors; ++j) sum[j] = fma(sum[j], rescale[j], chunk_sum[j]);
    products.template accumulate<vectors>(key, count, rescale);
  }
  finish<vectors, T>(head, begin, end - begin, products.o, set1(parts.after), highest, sum);
}

template <class Products, typename T>
void attend(const AttentionHead& head, void* memory) {
  const Products products(head.tokens, head.head_dim, static_cast<float*>(memory));
  const typename Products::Registers registers;
  products.pack_keys(static_cast<const T*>(head.k), head.k_stride, static_cast<const T*>(head.v), head.v_stride);
  for (int64_t begin = head.query_begin; begin < head.query_end;) {
    Products::over_vectors((head.query_end - begin + kWidth - 1) / kWidth, [&](auto n) {
      constexpr int vectors = decltype(n)::value;
      const int64_t end = begin + vectors * kWidth < head.query_end ? begin + vectors * kWidth : head.query_end;
      attend_block<vectors, T>(head, products, begin, end);
      begin = end;
    });
  }
}

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
