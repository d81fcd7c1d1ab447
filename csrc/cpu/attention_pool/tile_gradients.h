// The products with x of attention pooling's backward in bfloat16 by AMX's tiles, with as many windows at a time as fill 16 columns
// with their slots.
//
// - a . x and b . x: rows of a and b, 16 of any heads and windows, by the transposed slots. Of a product those sums are of use where
//   row and column are of one window, with 4 slots a quarter.
// - y and pooled: a window's ds and p, two rows a head, by its slots in pairs of rows, with tiles as short as the pairs are few.
//
// dx stays with vectors: it would be 4 rows of slots by as many words as there are heads, which at 2 heads is a 32nd of a tile.
// Counted by instructions of Sapphire Rapids, not timed: a window of 4 slots and 32 channels takes these products, with packing,
// rounding and stores, 320 cycles for 16 heads, 92 for 2 and 80 for one, and vectors 60 a head.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention_pool/attention_pool.h"
#include "cpu/attention_pool/tile_slots.h"

#if VLMKERN_TILES
namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

struct TileGradients {
  using Registers = Tiles;
  static constexpr int64_t kStep = 2 * kTile;                        // what is summed up by a product of tiles
  static constexpr int64_t kChannels = 128, kWords = kChannels / 2;  // of a chunk; at 16 heads and 4 slots its rows are 32 KB

  const PoolSlotsBwd& task;
  const int64_t vectors, panel;  // rows of a window; windows that share tiles of columns
  const SlotPairs pairs;
  int64_t columns, panel_rows, padded_vectors;  // tiles of columns and rows; rows of a window, padded
  float *p, *ds;                                // [window][head][slot]
  float *rows, *slots, *scores;                 // [window][vector][word]; [word][column] or [pair][channel]; [row][column]
  float *weights, *sums;                        // [vector][pair], [vector][channel]

  TileGradients(const PoolSlotsBwd& task, float* memory)
      : task(task), vectors(2 * task.heads), panel(panel_windows(task.size)), pairs(task.size) {
    place(memory);
  }

  // returns the words taken
  int64_t place(float* memory) {
    columns = tiles_of(panel * task.size), panel_rows = tiles_of(panel * vectors), padded_vectors = round_up(vectors, kTile);
    int64_t taken = 0;
    auto take = [&](int64_t words) {
      float* here = memory == nullptr ? nullptr : memory + taken;
      taken += round_up(words, 16);  // each part starts on a cache line
      return here;
    };
    p = take(panel * task.heads * task.size);
    ds = take(panel * task.heads * task.size);
    rows = take(panel_rows * kTile * kWords);
    slots = take(greatest(kWords * columns * kTile, pairs.words() * kChannels));
    scores = take(panel_rows * kTile * columns * kTile);
    weights = take(padded_vectors * pairs.words());
    sums = take(padded_vectors * kStep);
    return taken;
  }
  static int64_t words(const PoolSlotsBwd& task) { return TileGradients(task, nullptr).place(nullptr); }

  const bf16* x_of(int64_t window, int64_t slot) const {
    return static_cast<const bf16*>(task.x) + (window * task.size + slot) * task.width;
  }
  bf16* vector(int64_t window, int64_t i) const { return static_cast<bf16*>(task.vectors[i]) + window * task.width; }

  void score(int64_t first, int64_t count) const {
    const int64_t row = columns * kTile;
    for (int64_t c = 0; c < task.width; c += kChannels) {
      const int64_t here = least(kChannels, task.width - c), steps = round_up(here, kStep) / kStep;
      for (int64_t i = 0; i < count * vectors; ++i)
        pack_row<Bf16Pairs>(vector(first + i / vectors, i % vectors) + c, here, steps * kTile, rows + i * kWords);
      for (int64_t column = 0; column < row; column += kTile)
        transpose_words(
            steps * kTile, here,
            [&](int64_t i) {
              const bool real = column + i < count * task.size;
              return Slot<bf16>{real ? x_of(first, column + i) + c : nullptr, nullptr};
            },
            slots + column, row);
      tile_products(panel_rows, columns, rows, kTile * kWords, kTile, kWords, slots, kTile * row, row, steps, c == 0, scores, row);
    }
    for (int64_t i = 0; i < count * vectors; ++i) {
      const int64_t window = i / vectors, h = i % vectors / 2;
      float* to = (i % 2 == 0 ? p : ds) + (window * task.heads + h) * task.size;
      memcpy(to, scores + i * row + window * task.size, task.size * sizeof(float));
    }
  }

  void pool(int64_t first, int64_t count) const {
    Tiles::set_words(pairs.step_words);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t v = 0; v < vectors; ++v) {
        const float* from = (v % 2 == 0 ? ds : p) + (i * task.heads + v / 2) * task.size;
        for (int64_t j = 0; j < pairs.words(); j += kTile / 2) {
          float halves[kTile / 2];
          const int64_t left = task.size - 2 * j;
          store_halves(halves, load_n(from + 2 * j, int(left < kTile ? (left > 0 ? left : 0) : kTile)));
          memcpy(weights + v * pairs.words() + j, halves, least(kTile / 2, pairs.words() - j) * sizeof(float));
        }
      }
      for (int64_t c = 0; c < task.width; c += kChannels) {
        const int64_t here = least(kChannels, task.width - c);
        pack_pairs(
            pairs.words(), here,
            [&](int64_t j) { return Slot<bf16>{j < task.size ? x_of(first + i, j) + c : nullptr, nullptr}; }, slots, kChannels);
        for (int64_t part = 0; part < here; part += kStep) {
          pairs.multiply(padded_vectors, weights, slots + part, kChannels, sums);
          for (int64_t v = 0; v < vectors; ++v) {
            float halves[kTile];
            round_sums(sums + v * kStep, halves);
            memcpy(static_cast<void*>(vector(first + i, v) + c + part), halves, least(kStep, here - part) * sizeof(bf16));
          }
        }
      }
    }
    Tiles::set_words(kTile);
  }
};

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
#endif
