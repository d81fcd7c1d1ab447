// What becomes of scores before the softmax: which keys a query sees, and the cap.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

struct Range {
  int64_t begin, end;
};

inline int64_t between(int64_t low, int64_t x, int64_t high) { return x < low ? low : x > high ? high : x; }

// Of a group's sequence: scores in units that the softmax takes, and who sees whom.
class Scores {
 public:
  // of the scores, before their differences are taken; the cap has both parts in it
  const Scale scale;

  explicit Scores(const AttentionGroup& group)
      : scale(group.scores.softcap == 0 ? magnitude(group.scores.scale) : 1.0f), cap_(group.scores.softcap), factor_(factor(group.scores)),
        left_(group.scores.left), right_(group.scores.right), queries_(group.queries), keys_(group.keys) {}

  bool capped() const { return cap_ != 0; }
  bool windowed() const { return left_ >= 0 || right_ >= 0; }

  // The keys that a query sees; both ends only grow from query to query.
  Range seen(int64_t query) const {
    const int64_t place = query + keys_ - queries_;
    return {left_ < 0 ? 0 : between(0, place - left_, keys_), right_ < 0 ? keys_ : between(0, place + right_ + 1, keys_)};
  }
  // The keys that some of these queries see, from a multiple of `step` on.
  Range seen(int64_t begin, int64_t end, int64_t step) const { return {seen(begin).begin / step * step, seen(end - 1).end}; }
  // Whether all of these queries see all of these keys.
  bool all_seen(int64_t begin, int64_t end, Range keys) const {
    return !windowed() || (seen(end - 1).begin <= keys.begin && keys.end <= seen(begin).end);
  }
  // The first queries, which see no key: those whose place is so far before the first.
  int64_t without_keys() const {
    if (keys_ == 0) return queries_;
    return right_ < 0 ? 0 : between(0, queries_ - keys_ - right_, queries_);
  }

  // tanh of a score in units of the cap
  Vec in_caps(Vec score) const { return tanh(score * set1(factor_)); }
  Vec cap() const { return set1(cap_); }

 private:
  static float magnitude(float x) { return x < 0 ? -x : x; }
  static float factor(const AttentionScores& scores) {
    const float ratio = magnitude(scores.scale) / scores.softcap;
    return ratio <= __FLT_MAX__ ? ratio : __FLT_MAX__;  // infinity times no score would be NaN
  }

  const float cap_, factor_;
  const int64_t left_, right_, queries_, keys_;
};

// Which keys of a chunk the queries in the lanes see.
template <int vectors>
class Sight {
 public:
  Sight(const Scores& scores, int64_t begin, int64_t end, Range keys) : whole_(scores.all_seen(begin, end, keys)) {
    if (whole_) return;
    for (int64_t i = 0; i < vectors * kWidth; ++i) {
      // lanes without a query are as the last one
      const Range range = scores.seen(begin + i < end ? begin + i : end - 1);
      // from the chunk's beginning on, so that they are small and exact
      first_[i] = float(between(0, range.begin - keys.begin, keys.end - keys.begin));
      last_[i] = float(between(0, range.end - keys.begin, keys.end - keys.begin));
    }
  }
  bool whole() const { return whole_; }
  // x where a key, counted from the chunk's beginning, is seen
  Vec kept(Vec x, int64_t key, int j, Vec otherwise) const {
    const Vec here = set1(float(key));
    x = select_less(here, load(first_ + j * kWidth), otherwise, x);
    return select_less(here, load(last_ + j * kWidth), x, otherwise);
  }

 private:
  bool whole_;
  float first_[vectors * kWidth], last_[vectors * kWidth];
};

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
