// The online softmax of attention's forward, over products that vectors or tiles compute: softmax(scale * Q K^T) V of the heads
// that share keys and values.
//
// Queries lie in the SIMD lanes, so maximum, exponential and sum run down the lanes without a horizontal step. Keys go by in
// chunks; for each, scores are made, and the weights that come of them added to the sums (Milakov and Gimelshein, 2018).
//
// `Products` packs operands into scratch and multiplies:
//     Maths, kChunk               float32 or pairs of bfloat16; keys per chunk
//     Registers                   what a thread must hold while it multiplies
//     kStep                       what the first key of a block is a multiple of
//     words(keys, head_dim)       32-bit words of scratch
//     pack_keys<T>(...)           keys and values of the sequence
//     over_vectors(n, body)       calls body with the vectors of a block, an Int, where n are left
//     pack_queries<v, T>(...)     a block's queries
//     score<v>(key, count, top)   s [padded count][v][lane], unscaled, -inf beyond count, and their maximum
//     accumulate<v>(...)          o [channel][v][lane] = o * rescale + V^T P^T, or without o for a block's first chunk
//     s, p, o                     p [padded count / pair][v][lane]
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/attention/few_queries.h"
#include "cpu/attention/rotary.h"
#include "cpu/attention/scores.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// The scores as the softmax takes them, in the units of scores.scale.after, and highest[j] anew.
template <int vectors>
void shape_scores(float* s, int64_t count, const Scores& scores, const Sight<vectors>& sight, Vec (&highest)[vectors]) {
  const Vec before = set1(scores.scale.before);
  for (int64_t key = 0; key < count; ++key) {
    for (int j = 0; j < vectors; ++j) {
      float* at = s + (key * vectors + j) * kWidth;
      Vec x = load(at);
      x = scores.capped() ? scores.in_caps(x) * scores.cap() : x * before;
      if (!sight.whole()) x = sight.kept(x, key, j, set1(-kInfinity));
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

// One head of a group: where its queries lie, and room for a block of them as they are turned.
template <typename T>
struct HeadFwd {
  Rows<T> q;
  T* out;
  float* lse;
  T* turned;
};

// The block's output rows and log-sum-exps from the sums, [channels][vectors][lanes].
template <int vectors, typename T>
void finish(const AttentionGroupFwd& group, const HeadFwd<T>& head, int64_t begin, int64_t count, const float* o, Vec scale,
            const Vec (&highest)[vectors], const Vec (&sum)[vectors]) {
  for (int j = 0; j < vectors; ++j) {
    const int64_t lanes = count - j * kWidth < kWidth ? count - j * kWidth : kWidth;
    if (lanes <= 0) return;
    const Vec inverse = set1(1.0f) / sum[j];
    unpack_lanes(o + j * kWidth, vectors * kWidth, lanes, group.head_dim, inverse, head.out + (begin + j * kWidth) * group.out_stride,
                 group.out_stride);
    float top[kWidth], total[kWidth];
    store(top, highest[j] * scale);
    store(total, sum[j]);
    for (int64_t i = 0; i < lanes; ++i) head.lse[(begin + j * kWidth + i) * group.lse_stride] = top[i] + __builtin_logf(total[i]);
  }
}

template <int vectors, typename T, class Products>
void attend_block(const AttentionGroupFwd& group, const Scores& scores, const HeadFwd<T>& head, const Products& products, int64_t begin,
                  int64_t end) {
  using Maths = typename Products::Maths;
  // the maximum is taken before scaling, so a negative scale moves its sign to the queries
  const Rows<T> q = turned(head.q, group.rotate_q, begin, end, group.head_dim, head.turned);
  products.template pack_queries<vectors>(q.at, q.stride, end - begin, group.scores.scale < 0 ? Maths::sign_bits : 0);
  const Vec scale = set1(scores.scale.after * kLog2e);

  Vec highest[vectors], sum[vectors];
  for (int j = 0; j < vectors; ++j) highest[j] = set1(-kInfinity), sum[j] = set1(0.0f);
  const Range keys = scores.seen(begin, end, Products::kStep);
  for (int64_t key = keys.begin; key < keys.end; key += Products::kChunk) {
    const int64_t count = keys.end - key < Products::kChunk ? keys.end - key : Products::kChunk;
    Vec next[vectors], shift[vectors], rescale[vectors];
    for (int j = 0; j < vectors; ++j) next[j] = highest[j];
    products.template score<vectors>(key, count, next);
    const Sight<vectors> sight(scores, begin, end, {key, key + count});
    if (scores.scale.before != 1 || scores.capped() || !sight.whole()) {
      for (int j = 0; j < vectors; ++j) next[j] = highest[j];
      shape_scores<vectors>(products.s, count, scores, sight, next);
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
    products.template accumulate<vectors>(key, count, key == keys.begin, rescale);
  }
  finish<vectors, T>(group, head, begin, end - begin, products.o, set1(scores.scale.after), highest, sum);
}

// Heads of one query each as one head of many: they stand at the same place.
template <typename T>
AttentionGroupFwd heads_as_queries(AttentionGroupFwd group) {
  const Range seen = Scores(group).seen(0);
  group.k = static_cast<const T*>(group.k) + seen.begin * group.k_stride;
  group.v = static_cast<const T*>(group.v) + seen.begin * group.v_stride;
  if (group.rotate_k.cos != nullptr) {
    group.rotate_k.cos += seen.begin * group.rotate_k.cos_stride;
    group.rotate_k.sin += seen.begin * group.rotate_k.sin_stride;
  }
  group.keys = seen.end - seen.begin;
  group.scores.left = group.scores.right = -1;
  group.rotate_q.cos_stride = group.rotate_q.sin_stride = 0;
  group.queries = group.heads, group.heads = 1;
  group.q_stride = group.q_head_stride, group.out_stride = group.out_head_stride, group.lse_stride = group.lse_head_stride;
  return group;
}

// Words of scratch for keys and a block of queries as they are turned.
inline int64_t rotation_words(int64_t keys, int64_t head_dim) { return (keys + kMaxVectors * kWidth) * head_dim; }

template <typename T>
void attend_few(const AttentionGroupFwd& group, const Scores& scores, float* memory) {
  const FewQueries<T> few(group, scores, memory);
  T* const room = reinterpret_cast<T*>(memory + FewQueries<T>::words(group.head_dim));
  for (int64_t h = 0; h < group.heads; ++h) {
    const int64_t begin = between(0, group.begin - h * group.queries, group.queries);
    const int64_t end = between(0, group.end - h * group.queries, group.queries);
    if (begin == end) continue;
    const Rows<T> q = turned(Rows<T>{static_cast<const T*>(group.q) + h * group.q_head_stride, group.q_stride}, group.rotate_q, begin, end,
                             group.head_dim, room);
    few.attend(q.at, q.stride, begin, end, static_cast<T*>(group.out) + h * group.out_head_stride, group.lse + h * group.lse_head_stride);
  }
}

template <class Products, typename T>
void attend(const AttentionGroupFwd& given, void* memory) {
  const AttentionGroupFwd group = given.queries == 1 && given.heads > 1 ? heads_as_queries<T>(given) : given;
  const Scores scores(group);
  if (group.queries <= FewQueries<T>::kMost && group.keys > 0 && !scores.windowed() && group.rotate_k.cos == nullptr)
    return attend_few<T>(group, scores, static_cast<float*>(memory));
  const Products products(group.keys, group.head_dim, static_cast<float*>(memory));
  const typename Products::Registers registers;
  T* const turned_keys = reinterpret_cast<T*>(static_cast<float*>(memory) + Products::words(group.keys, group.head_dim));
  const Rows<T> k = turned(Rows<T>{static_cast<const T*>(group.k), group.k_stride}, group.rotate_k, 0, group.keys, group.head_dim, turned_keys);
  products.pack_keys(k.at, k.stride, static_cast<const T*>(group.v), group.v_stride);
  for (int64_t h = 0; h < group.heads; ++h) {
    const HeadFwd<T> head{{static_cast<const T*>(group.q) + h * group.q_head_stride, group.q_stride},
                            static_cast<T*>(group.out) + h * group.out_head_stride,
                            group.lse + h * group.lse_head_stride,
                            turned_keys + group.keys * group.head_dim};
    int64_t begin = between(0, group.begin - h * group.queries, group.queries);
    const int64_t last = between(0, group.end - h * group.queries, group.queries);
    for (; begin < last && begin < scores.without_keys(); ++begin) {
      memset(static_cast<void*>(head.out + begin * group.out_stride), 0, group.head_dim * sizeof(T));
      head.lse[begin * group.lse_stride] = -kInfinity;
    }
    while (begin < last) {
      Products::over_vectors((last - begin + kWidth - 1) / kWidth, [&](auto n) {
        constexpr int vectors = decltype(n)::value;
        const int64_t end = begin + vectors * kWidth < last ? begin + vectors * kWidth : last;
        attend_block<vectors, T>(group, scores, head, products, begin, end);
        begin = end;
      });
    }
  }
}

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
