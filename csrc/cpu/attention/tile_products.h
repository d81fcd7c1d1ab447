// The products of softmax.h in bfloat16 by AMX's tiles, 32 queries a block.
//
// S^T = K Q^T: tiles of 16 keys x 32 channels, rows of k as they come, by the block's queries in the lanes. O^T = V^T P^T: tiles of
// 16 channels x 32 keys, v transposed once a head, by the weights as exponentiate() leaves them. 72 channels are 96 for the first
// product and 80 for the second. SDPA, which packs k and v again for every block of queries, has 219 GFLOP/s at 729 tokens of D = 72
// on Sapphire Rapids, a first form of this 560; of its time 27 % are exponentials, 33 % the products, 24 % packing.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention/softmax.h"

#if VLMKERN_TILES
namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// Rows of a tensor as tiles [channel tile][step][channel][word], a word being a pair of rows; zero beyond them.
inline void pack_transposed(const bf16* from, int64_t stride, int64_t rows, int64_t head_dim, int64_t steps, float* to) {
  const int64_t channel_tiles = (head_dim + kTile - 1) / kTile;
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t c = 0; c < channel_tiles; ++c) {
      const int lanes = int(head_dim - c * kTile < kTile ? head_dim - c * kTile : kTile);
      Vec square[kTile];
      for (int i = 0; i < kTile; ++i) {
        const int64_t n = 2 * (step * kTile + i);
        const bf16* row = from + n * stride + c * kTile;
        const Vec first = n < rows ? load_n(row, lanes) : set1(0.0f);
        square[i] = pair_up(first, n + 1 < rows ? load_n(row + stride, lanes) : set1(0.0f));
      }
      transpose(square);
      for (int i = 0; i < kTile; ++i) store(to + (c * steps + step) * kTileWords + i * kTile, square[i]);
    }
}

// sums [channel][lane] (+)= what pack_transposed() made, from some step on, by pairs of rows in 32 lanes; `next` words between its
// tiles of channels.
inline void add_transposed(const float* from, int64_t next, int64_t channel_tiles, const float* pairs, int64_t steps, bool first,
                           float* sums) {
  constexpr int64_t kLanes = 2 * kTile;
  for (int64_t c = 0; c < channel_tiles; c += 2) {
    float* to = sums + c * kTile * kLanes;
    if (c + 1 < channel_tiles)
      tile_product<2, 2>(from + c * next, next, kTileWords, kTile, pairs, kTile * kLanes, kLanes, steps, first, to, kLanes);
    else
      tile_product<1, 2>(from + c * next, next, kTileWords, kTile, pairs, kTile * kLanes, kLanes, steps, first, to, kLanes);
  }
}

struct TileProducts {
  using Maths = Bf16Pairs;
  using Registers = Tiles;
  static constexpr int kChunk = 256;  // 128 keys change nothing on Sapphire Rapids, nor do 64 queries
  static constexpr int kVectors = 2;
  static constexpr int64_t kLanes = kVectors * kTile;
  static constexpr int64_t kStep = 2 * kTile;  // keys or channels of a step
  static_assert(kWidth == kTile);

  int64_t keys, head_dim;
  int64_t head_steps, head_words, channel_tiles, key_steps;
  float *k, *v, *q, *rows, *s, *p, *o;

  TileProducts(int64_t keys, int64_t head_dim, float* memory) : keys(keys), head_dim(head_dim) { place(memory); }

  // returns the words taken
  int64_t place(float* memory) {
    head_steps = (head_dim + kStep - 1) / kStep, head_words = head_steps * kTile;
    channel_tiles = (head_dim + kTile - 1) / kTile, key_steps = (keys + kStep - 1) / kStep;
    int64_t taken = 0;
    auto take = [&](int64_t words) {
      float* here = memory == nullptr ? nullptr : memory + taken;
      taken += round_up(words, 16);  // each part starts on a cache line
      return here;
    };
    k = take(key_steps * kStep * head_words);
    v = take(channel_tiles * key_steps * kTileWords);
    q = take(head_words * kLanes);
    rows = take(kTile * head_words);
    s = take(kChunk * kLanes);
    p = take(kChunk / 2 * kLanes);
    o = take(channel_tiles * kTile * kLanes);
    return taken;
  }
  static int64_t words(int64_t keys, int64_t head_dim) { return TileProducts(keys, head_dim, nullptr).place(nullptr); }
  static int64_t padded(int64_t count) { return round_up(count, kStep); }

  template <class Body>
  static void over_vectors(int64_t, Body body) {
    body(Int<kVectors>());
  }

  void pack_keys(const bf16* from_k, int64_t k_stride, const bf16* from_v, int64_t v_stride) const {
    pack_words<Maths>(from_k, k_stride, keys, head_dim, key_steps * kStep, head_words, k);
    pack_transposed(from_v, v_stride, keys, head_dim, key_steps, v);
  }
  template <int vectors>
  void pack_queries(const bf16* from, int64_t stride, int64_t count, uint32_t flipped_bits) const {
    pack_block<Maths, vectors>(from, stride, count, head_dim, head_words, rows, q, flipped_bits);
  }
  template <int vectors>
  void score(int64_t key, int64_t count, Vec (&highest)[vectors]) const {
    for (int64_t n = 0; n < count; n += kStep)
      tile_product<2, 2>(k + (key + n) * head_words, kTile * head_words, kTile, head_words, q, kTile * kLanes, kLanes, head_steps, true,
                         s + n * kLanes, kLanes);
    for (int64_t n = 0; n < count; ++n)
      for (int j = 0; j < vectors; ++j) highest[j] = max(highest[j], load(s + (n * vectors + j) * kWidth));
    for (int64_t n = count; n < padded(count); ++n)
      for (int j = 0; j < vectors; ++j) store(s + (n * vectors + j) * kWidth, set1(-kInfinity));
  }
  template <int vectors>
  void accumulate(int64_t key, int64_t count, bool first, const Vec (&rescale)[vectors]) const {
    if (!first)
      for (int64_t c = 0; c < channel_tiles * kTile; ++c)
        for (int j = 0; j < vectors; ++j) {
          float* at = o + (c * vectors + j) * kWidth;
          store(at, load(at) * rescale[j]);
        }
    add_transposed(v + key / kStep * kTileWords, key_steps * kTileWords, channel_tiles, p, padded(count) / kStep, first, o);
  }
};

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
#endif
