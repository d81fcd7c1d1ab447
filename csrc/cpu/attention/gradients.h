// What the forms of attention's backward share: scratch in the layouts that products take, and weights from scores.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/attention/scores.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// Everything below counts in 32-bit words: a float32, or a pair of bfloat16. A `Form` of the kernel says how it multiplies:
//     Maths                          float32 or pairs of bfloat16
//     kLanes, kQueries, kChunk       queries of a part of a block, and of a block; keys of a chunk
//     kStep                          what sums of products are padded to: channels of scores, queries, keys; a block's first key
//                                    is a multiple of it
//     kKeys, kKeyRows, kChannels     what keys are padded to in all, and in a chunk; channels that are not summed over
//     kTiled                         whether scores go through memory on their way to the weights
//     Registers                      what a thread must hold while it multiplies
//     over_vectors(n, body)          calls body with the vectors of a part, an Int, where there are n
//     pack_keys(...)                 keys as add_dq takes them
//     weigh<v>(...)                  P and dS of a chunk of keys and a part
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

// The weight of a score, and the slope of the cap there.
struct Weight {
  Vec p, slope;
};

// How weights come of the scores: from log-sum-exps, or settled from the largest scores and the sums of the weights; or, shaped, from
// either with all that Scores may ask.
enum class From { lse, settled, shaped };

// Of a part's queries and a chunk of keys.
template <class Maths, int vectors, From from>
class Weights {
 public:
  static constexpr bool kShaped = from == From::shaped;

  template <class Scratch>
  Weights(const Scores& scores, const Scratch& scratch, int64_t lane, int64_t begin, int64_t end, Range keys, bool settled)
      : scores_(scores), sight_(scores, begin, end, keys), present_(end - begin), settled_(settled), shift_(scratch.shift + lane),
        inverse_(scratch.inverse + lane), delta_(scratch.delta + lane), before_(set1(scores.scale.before)),
        scale_(set1(scores.scale.after * kLog2e)) {}

  // of the key that is so many after the chunk's first
  Weight of(Vec score, int64_t key, int j) const {
    Weight weight{score, set1(1.0f)};
    if constexpr (from == From::lse) {
      weight.p = from_lse(score, j);
    } else if constexpr (from == From::settled) {
      weight.p = from_sums(score * before_, j);
    } else {
      if (scores_.capped()) {
        const Vec in_caps = scores_.in_caps(score);
        score = in_caps * scores_.cap();
        weight.slope = set1(1.0f) - in_caps * in_caps;
      } else {
        score = score * before_;
      }
      weight.p = settled_ ? from_sums(score, j) : from_lse(score, j);
      if (!sight_.whole()) weight.p = sight_.kept(weight.p, key, j, set1(0.0f));
    }
    weight.p = present_.kept(weight.p, j);
    return weight;
  }
  // P * (dP - delta), in the units of q k
  Vec gradient(const Weight& weight, Vec dp, int j) const {
    Vec ds = weight.p * (dp - load(delta_ + j * kWidth));
    if constexpr (kShaped) {
      ds = ds * weight.slope;
      // where a key is not seen, or a query not there, other values need not be finite
      if (!sight_.whole()) ds = select_equal(weight.p, set1(0.0f), set1(0.0f), ds);
    }
    return present_.kept(ds, j);
  }

 private:
  Vec from_lse(Vec score, int j) const {
    // a score is at most its row's log-sum-exp but for rounding
    return exp2_nonpositive<Maths::exp2_degree>(min(set1(0.0f), fma(score, scale_, set1(0.0f) - load(shift_ + j * kWidth))));
  }
  Vec from_sums(Vec score, int j) const {
    return exp2_nonpositive<Maths::exp2_degree>((score - load(shift_ + j * kWidth)) * scale_) * load(inverse_ + j * kWidth);
  }

  const Scores& scores_;
  const Sight<vectors> sight_;
  const Present<vectors> present_;
  const bool settled_;
  const float *shift_, *inverse_, *delta_;  // shift: a query's log-sum-exp in units of ln 2, or settled its largest score
  const Vec before_, scale_;
};

// The largest score, one over the sum of the weights, and delta of the up to kLanes queries from `begin` to `end`, all from q, k, v
// and grad. With delta summed like P * dO V^T, a query that sees one key alone has a dS of zero, as it should.
template <class Form, int vectors>
void settle(const Layout<Form>& layout, const Scratch<Form>& scratch, int64_t part, const Scores& scores, int64_t begin, int64_t end) {
  using Maths = typename Form::Maths;
  constexpr int64_t kLanes = Form::kLanes;
  const float* q = scratch.q_lanes + part * layout.head_words * kLanes;
  const float* grad = scratch.grad_lanes + part * layout.head_words * kLanes;
  const Vec before = set1(scores.scale.before), after = set1(scores.scale.after * kLog2e);
  Vec highest[vectors], total[vectors], delta[vectors];
  for (int j = 0; j < vectors; ++j) highest[j] = set1(-kInfinity), total[j] = delta[j] = set1(0.0f);
  const Range seen = scores.seen(begin, end, Form::kStep);
  for (int64_t key = seen.begin; key < seen.end; key += kRows) {
    const int rows = int(seen.end - key < kRows ? seen.end - key : kRows);
    const Sight<vectors> sight(scores, begin, end, {key, key + rows});
    Vec s[kRows][vectors] = {}, dp[kRows][vectors] = {};
    multiply<Maths, vectors>(s, scratch.keys + key * layout.key_words, layout.key_words, 1, q, layout.head_words);
    multiply<Maths, vectors>(dp, scratch.values + key * layout.head_words, layout.head_words, 1, grad, layout.head_words);
    for (int j = 0; j < vectors; ++j) {
      Vec top = highest[j];
      for (int r = 0; r < rows; ++r) {
        s[r][j] = scores.capped() ? scores.in_caps(s[r][j]) * scores.cap() : s[r][j] * before;
        if (!sight.whole()) s[r][j] = sight.kept(s[r][j], r, j, set1(-kInfinity));
        top = max(top, s[r][j]);
      }
      // while every score is -inf there is no maximum to subtract, and -inf less -inf would be NaN
      const Vec shift = select_equal(top, set1(-kInfinity), set1(0.0f), top);
      const Vec rescale = exp2_nonpositive<6>((highest[j] - shift) * after);
      total[j] = total[j] * rescale, delta[j] = delta[j] * rescale, highest[j] = top;
      for (int r = 0; r < rows; ++r) {
        const Vec p = exp2_nonpositive<Maths::exp2_degree>((s[r][j] - shift) * after);
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
