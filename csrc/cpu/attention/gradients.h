// The scratch of attention's backward, in the layouts that its products take.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// Everything below counts in 32-bit words: a float32, or a pair of bfloat16. A `Form` of the kernel says how it multiplies:
//     Maths                          float32 or pairs of bfloat16
//     kLanes, kQueries, kChunk       queries of a part of a block, and of a block; keys of a chunk
//     kStep                          what sums of products are padded to: channels of scores, queries, keys
//     kKeys, kKeyRows, kChannels     what keys are padded to in all, and in a chunk; channels that are not summed over
//     kTiled                         whether scores go through memory on their way to the weights
//     Registers                      what a thread must hold while it multiplies
//     over_vectors(n, body)          calls body with the vectors of a part, an Int, where there are n
//     pack_keys(...)                 keys as add_dq takes them
//     weigh<v, settled>(...)         P and dS of a chunk of keys and a part
//     add_dq<v>(...)                 K^T dS^T of the same
//     add_rows(...)                  P^T dO or dS^T Q of a chunk and a block
template <class Form>
struct Layout {
  // words of a row of q, k, v or grad; channels padded for rows and for lanes; padded keys; words between keys
  int64_t head_words, channels, columns, keys, key_words;
  Layout(int64_t tokens, int64_t head_dim)
      : head_words(round_up(head_dim, Form::kStep) / Form::Maths::pair), channels(round_up(head_dim, Form::kChannels)),
        columns(round_up(head_dim, kWidth)), keys(round_up(tokens, Form::kKeys)),
        key_words(Form::Maths::pair == 1 ? channels : head_words) {}
};

// Words between keys of P and dS.
template <class Form>
constexpr int64_t kWeightRow = Form::kQueries / Form::Maths::pair;

template <class Form>
struct Scratch {
  float *key_pairs, *keys, *values;                     // k by pairs of keys; k and v row by row
  float *q_lanes, *grad_lanes, *q_pairs, *grad_pairs;   // of a block of queries: in the lanes, and by pairs of queries
  float *rows;
  float *p, *ds, *ds_lanes;                             // [key][query], and ds by pairs of keys
  float *dq, *dk, *dv;
  // of a block's queries: lse in units of ln 2, or the largest score and one over the sum of the weights; delta
  float *shift, *inverse, *delta;
  float *scores, *slopes;  // [key][query] of a chunk and a part: q k and grad v

  // returns the words taken
  int64_t place(const Layout<Form>& layout, float* memory) {
    constexpr int pair = Form::Maths::pair, kQueries = Form::kQueries, kChunk = Form::kChunk;
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
    p = take(kChunk * kWeightRow<Form>);
    ds = take(kChunk * kWeightRow<Form>);
    ds_lanes = pair == 1 ? ds : take(kChunk / pair * kQueries);
    dq = take(layout.channels * kQueries);
    dk = take(layout.keys * layout.columns);
    dv = take(layout.keys * layout.columns);
    shift = take(kQueries);
    inverse = take(kQueries);
    delta = take(kQueries);
    scores = take(Form::kTiled ? kChunk * Form::kLanes : 0);
    slopes = take(Form::kTiled ? kChunk * Form::kLanes : 0);
    return taken;
  }
};

// Where a block's part for kLanes of its queries begins, and the words between its keys (or pairs of keys).
template <class Form>
float* ds_part(const Scratch<Form>& scratch, int64_t part) {
  constexpr int pair = Form::Maths::pair;
  return scratch.ds_lanes + part * (pair == 1 ? Form::kLanes : Form::kChunk / pair * Form::kLanes);
}
template <class Form, int vectors>
constexpr int64_t ds_step() {
  return Form::Maths::pair == 1 ? Form::kQueries : vectors * kWidth;
}

// The weight of a score. `shift` is a query's log-sum-exp in units of ln 2, or settled its largest score.
template <class Maths, bool settled>
inline Vec weight_of(Vec score, Vec shift, Vec inverse, Vec before, Vec scale) {
  if constexpr (settled) {
    return exp2_nonpositive<Maths::exp2_degree>((score * before - shift) * scale) * inverse;
  } else {
    // a score is at most its row's log-sum-exp but for rounding
    return exp2_nonpositive<Maths::exp2_degree>(min(set1(0.0f), fma(score, scale, set1(0.0f) - shift)));
  }
}

// Lanes without a query have weight 0 even where a key is not finite.
template <int vectors>
struct Present {
  float one[vectors * kWidth];
  bool partial;
  explicit Present(int64_t queries) : partial(queries < vectors * kWidth) {
    for (int64_t i = 0; i < vectors * kWidth; ++i) one[i] = i < queries ? 1.0f : 0.0f;
  }
  Vec kept(Vec x, int j) const { return partial ? select_equal(load(one + j * kWidth), set1(0.0f), set1(0.0f), x) : x; }
};

// The largest score, one over the sum of the weights, and delta of up to kLanes queries, all from q, k, v and grad. With
// delta summed like P * dO V^T, a query that sees one key alone has a dS of zero, as it should.
template <class Form, int vectors>
void settle(const Layout<Form>& layout, const Scratch<Form>& scratch, int64_t part, int64_t tokens, Scale scale) {
  using Maths = typename Form::Maths;
  constexpr int64_t kLanes = Form::kLanes;
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

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
