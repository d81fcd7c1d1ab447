// The products of attention's backward in bfloat16 by AMX's tiles.
//
// Scores and slopes of a chunk of keys and 32 queries go through memory, [key][query]; the weights that come of them are written
// twice: by keys, as rows of the products that give dV and dK, and by pairs of keys, for dQ^T = K^T dS^T, whose k is transposed once a head.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention/gradients.h"
#include "cpu/attention/tile_products.h"

#if VLMKERN_TILES
namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

struct TileForm {
  using Maths = Bf16Pairs;
  using Registers = Tiles;
  static constexpr bool kTiled = true;
  // a block's weights by a chunk of keys are 32 KB each of P and dS
  static constexpr int kVectors = 2, kLanes = kVectors * kTile, kQueries = 4 * kLanes, kChunk = 128;
  static constexpr int kStep = 2 * kTile, kKeys = kStep, kKeyRows = kStep, kChannels = kTile;

  template <class Body>
  static void over_vectors(int64_t, Body body) {
    body(Int<kVectors>());
  }
  static void pack_keys(const Layout<TileForm>& layout, const bf16* k, int64_t stride, int64_t tokens, int64_t head_dim, float* to) {
    pack_transposed(k, stride, tokens, head_dim, layout.keys / kStep, to);
  }
  template <int vectors, class Weights>
  static void weigh(const Layout<TileForm>& layout, const Scratch<TileForm>& scratch, int64_t part, Range keys, const Weights& weights) {
    const int64_t key_begin = keys.begin, count = keys.end - keys.begin;
    const int64_t rows = round_up(count, kStep), words = layout.head_words, at = part * words * kLanes;
    for (int64_t key = 0; key < rows; key += kStep) {
      const int64_t row = (key_begin + key) * words;
      tile_product<2, 2>(scratch.keys + row, kTile * words, kTile, words, scratch.q_lanes + at, kTile * kLanes, kLanes, words / kTile, true,
                         scratch.scores + key * kLanes, kLanes);
      tile_product<2, 2>(scratch.values + row, kTile * words, kTile, words, scratch.grad_lanes + at, kTile * kLanes, kLanes, words / kTile,
                         true, scratch.slopes + key * kLanes, kLanes);
    }
    float *const ds_words = ds_part(scratch, part);
    for (int64_t key = 0; key < rows; key += 2) {
      for (int j = 0; j < vectors; ++j) {
        Vec p[2], ds[2];
        for (int r = 0; r < 2; ++r) {
          const int64_t from = (key + r) * kLanes + j * kWidth, to = ((key + r) * kQueries + part * kLanes + j * kWidth) / 2;
          p[r] = ds[r] = set1(0.0f);
          if (key + r < count) {
            const Weight weight = weights.of(load(scratch.scores + from), key + r, j);
            p[r] = weight.p;
            ds[r] = weights.gradient(weight, load(scratch.slopes + from), j);
          }
          store_halves(scratch.p + to, p[r]);
          store_halves(scratch.ds + to, ds[r]);
        }
        store(ds_words + key / 2 * kLanes + j * kWidth, interleave(ds[0], ds[1]));
      }
    }
  }
  template <int vectors>
  static void add_dq(const Layout<TileForm>& layout, const Scratch<TileForm>& scratch, int64_t part, Range keys, bool first) {
    add_transposed(scratch.key_pairs + keys.begin / kStep * kTileWords, layout.keys / kStep * kTileWords, layout.channels / kTile,
                   ds_part(scratch, part), round_up(keys.end - keys.begin, kStep) / kStep, first, scratch.dq + part * layout.channels * kLanes);
  }
  static void add_rows(int64_t rows, const float* weights, const float* b, int64_t columns, int64_t words, bool first, float* sums) {
    constexpr int64_t kRow = kWeightRow<TileForm>;
    for (int64_t row = 0; row < rows; row += 2 * kTile)
      for (int64_t c = 0; c < columns; c += 2 * kTile) {
        const float* from = weights + row * kRow;
        float* to = sums + row * columns + c;
        if (c + kTile < columns)
          tile_product<2, 2>(from, kTile * kRow, kTile, kRow, b + c, kTile * columns, columns, words / kTile, first, to, columns);
        else
          tile_product<2, 1>(from, kTile * kRow, kTile, kRow, b + c, kTile * columns, columns, words / kTile, first, to, columns);
      }
  }
};

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
#endif
