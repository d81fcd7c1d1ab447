// The products of heads.h in bfloat16 by AMX's tiles. A row is a head of a window.
//
// - W_K,h^T q_h: 16 windows' rows of q by W_K in pairs of its rows, which takes no transposition; rounded, they are rows of channels.
// - Scores: 16 such rows by the transposed slots of as many windows as fill 16 columns. Of a product those are of use where row and
//   column are of one window, with 16 heads and 4 slots a quarter.
// - Pooling: a window's weights, 16 heads by its slots in pairs, by its slots in pairs of rows. 4 slots are two words, so the tiles
//   are made that short: a product of 16 words would want 14 rows of zeros, and takes no less time.
// - Context: 16 windows' rows of pooled slots by W_V transposed, whose sums stay in memory between chunks.
//
// Counted, not timed, per 16 windows of 4 slots, 16 heads of 72 and 2304 channels: 6,912, 1,152, 2,304 and 5,760 products of 16 cycles,
// 258,000 cycles in all, where vectors take 2,800,000 vdpbf16ps, which Sapphire Rapids begins one of a cycle. Only pooling is close:
// 37,000 cycles against 74,000, and tiles' sums go through memory on their way to bfloat16, 37,000 rows of 16. Rounding, transposing
// and packing are about 250,000 cycles more, 100,000 of them of weights, at 144 windows a block.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention_pool/heads.h"
#include "cpu/attention_pool/tile_slots.h"

#if VLMKERN_TILES
namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

struct TileHeads {
  using Maths = Bf16Pairs;
  using Registers = Tiles;
  static constexpr int64_t kStep = 2 * kTile;  // what is summed up by a product of tiles; rows and columns of two of them
  static constexpr int64_t kChannels = 128, kWords = kChannels / 2;
  // 16 heads of 72 take 10 KB a window, and 2 MB of L2 hold the weights and slots that come next as well
  static constexpr int64_t kBlock = 144;

  struct Group {
    int64_t begin, count;
  };

  const PoolHeads& task;
  const PoolWindows& p;
  const int64_t heads, windows;
  const int64_t panel;  // windows that share tiles of columns
  const SlotPairs pairs;
  int64_t columns, panel_rows, panels;                 // tiles of a panel's columns and rows; panels of a block
  int64_t padded_heads, key_steps, key_words, values;  // values: of a head, padded to tiles
  int64_t pooled_stride;                               // between heads
  float *q, *scores, *sums_of_values;                  // [head][window][word], [panel][row][column], [head][window][value]
  float *rows;                                         // [window][head][word]; when pooled, [head][window][word]
  float *slots;                                        // [panel][word][column]; to be pooled, [window][pair][channel]
  float *p_words, *inverse;                            // [window][head][pair], [window][head]
  float *weights, *sums, *lanes;
  Group groups[kBlock / kStep + 1];
  int count = 0;

  TileHeads(const PoolHeads& task, float* memory)
      : task(task), p(task.windows), heads(task.head_end - task.head_begin), windows(task.end - task.begin),
        panel(panel_windows(p.size)), pairs(p.size) {
    place(memory);
    for (int64_t begin = task.begin; begin < task.end; begin += kStep) groups[count++] = {begin, least(kStep, task.end - begin)};
  }

  // returns the words taken
  int64_t place(float* memory) {
    padded_heads = round_up(heads, kTile);
    key_steps = round_up(task.key_dim, kStep) / kStep, key_words = key_steps * kTile, values = round_up(task.value_dim, kTile);
    columns = tiles_of(panel * p.size), panel_rows = tiles_of(panel * heads), panels = round_up(kBlock, panel) / panel;
    pooled_stride = kBlock * kWords + kTile;  // a line apart, or all heads' rows of a window would fall into one set of L1
    int64_t taken = 0;
    auto take = [&](int64_t words) {
      float* here = memory == nullptr ? nullptr : memory + taken;
      taken += round_up(words, 16);  // each part starts on a cache line
      return here;
    };
    // the context's sums take the place of the queries and scores
    q = sums_of_values = take(0);
    take(heads * kBlock * key_words);
    scores = take(panels * panel_rows * kTile * columns * kTile);
    take(greatest(0, heads * kBlock * values - taken));
    // products take whole tiles of rows, also where the last panel has fewer
    rows = take(greatest((panels * panel * heads + kTile) * kWords, heads * pooled_stride));
    slots = take(greatest(panels * kWords * columns * kTile, kBlock * pairs.words() * kChannels));
    p_words = take(kBlock * padded_heads * pairs.words());
    inverse = take(kBlock * heads);
    weights = take(greatest(key_words * kChannels, kWords * values));
    sums = take(greatest(padded_heads, kStep) * kStep);
    lanes = take((p.size + 1) * kTile);
    return taken;
  }
  static int64_t words(const PoolHeads& task) { return TileHeads(task, nullptr).place(nullptr); }

  int64_t width() const { return p.layers * p.channels; }

  void pack_queries() const {
    const int64_t stride = task.heads * task.key_dim;
    const bf16* from = static_cast<const bf16*>(task.q) + task.begin * stride + task.head_begin * task.key_dim;
    for (int64_t h = 0; h < heads; ++h)
      pack_words<Maths>(from + h * task.key_dim, stride, windows, task.key_dim, round_up(windows, kTile), key_words,
                        q + h * kBlock * key_words);
  }

  void pack_channels(const Chunk& chunk) const {
    for (int64_t first = 0; first < windows; first += panel) {
      const int64_t here = least(panel, windows - first) * p.size;
      for (int64_t column = 0; column < columns * kTile; column += kTile)
        transpose_words(
            round_up(chunk.count, kStep) / 2, chunk.count,
            [&](int64_t i) {
              return column + i < here ? slot_at<bf16>(p, task.begin + first, column + i, chunk.layer, chunk.channel)
                                       : Slot<bf16>{nullptr, nullptr};
            },
            slots + first / panel * kWords * columns * kTile + column, columns * kTile);
    }
  }

  template <class Ahead>
  void score(const Chunk& chunk, int64_t h, const bf16* w_k, Ahead ahead) const {
    const int64_t channels = round_up(chunk.count, kStep);
    pack_rows<Maths>(w_k, width(), task.key_dim, chunk.count, 2 * key_words, channels, weights);
    for (int i = 0; i < count; ++i) {
      ahead(i);
      for (int64_t c = 0; c < channels; c += kStep) {
        tile_products(tiles_of(groups[i].count), 2, q + (h * kBlock + i * kStep) * key_words, kTile * key_words, kTile, key_words,
                      weights + c, kTile * channels, channels, key_steps, true, sums, kStep);
        for (int64_t w = 0; w < groups[i].count; ++w)
          round_sums(sums + w * kStep, rows + ((i * kStep + w) * heads + h) * kWords + c / 2);
      }
    }
    if (h + 1 < heads) return;
    const int64_t row = columns * kTile;
    for (int64_t first = 0; first < windows; first += panel)
      tile_products(panel_rows, columns, rows + first * heads * kWords, kTile * kWords, kTile, kWords, slots + first / panel * kWords * row,
                    kTile * row, row, channels / kStep, chunk.column == 0, scores + first / panel * panel_rows * kTile * row, row);
  }

  void weigh() const {
    const int64_t words = pairs.words();
    memset(static_cast<void*>(p_words), 0, windows * padded_heads * words * sizeof(float));
    for (int64_t first = 0; first < windows; first += panel) {
      const int64_t here = least(panel, windows - first) * heads;
      const float* from = scores + first / panel * panel_rows * kTile * columns * kTile;
      for (int64_t row = 0; row < here; row += kTile) {
        const int64_t some = least(kTile, here - row);
        memset(static_cast<void*>(lanes), 0, p.size * kTile * sizeof(float));
        for (int64_t i = 0; i < some; ++i) {
          const float* mine = from + (row + i) * columns * kTile + (row + i) / heads * p.size;
          for (int64_t j = 0; j < p.size; ++j) lanes[j * kTile + i] = mine[j];
        }
        softmax<Maths, 1>(lanes, p.size, task.scale);
        for (int64_t i = 0; i < some; ++i) {
          const int64_t window = first + (row + i) / heads, h = (row + i) % heads;
          for (int64_t j = 0; 2 * j < p.size; ++j) p_words[(window * padded_heads + h) * words + j] = lanes[j * kTile + i];
          inverse[window * heads + h] = lanes[p.size * kTile + i];
        }
      }
    }
  }

  void pack_slots(const Chunk& chunk) const {
    for (int64_t window = 0; window < windows; ++window)
      pack_pairs(
          pairs.words(), chunk.count,
          [&](int64_t j) {
            return j < p.size ? slot_at<bf16>(p, task.begin + window, j, chunk.layer, chunk.channel) : Slot<bf16>{nullptr, nullptr};
          },
          slots + window * pairs.words() * kChannels, kChannels);
  }

  // Pooled slots of all heads over one chunk.
  void mix(const Chunk& chunk) const {
    const int64_t words = pairs.words();
    Tiles::set_words(pairs.step_words);
    for (int64_t window = 0; window < windows; ++window)
      for (int64_t c = 0; c < chunk.count; c += kStep) {
        pairs.multiply(padded_heads, p_words + window * padded_heads * words, slots + window * words * kChannels + c, kChannels, sums);
        for (int64_t h = 0; h < heads; ++h) round_sums(sums + h * kStep, rows + h * pooled_stride + window * kWords + c / 2);
      }
    Tiles::set_words(kTile);
  }

  template <class Ahead>
  void pool(const Chunk& chunk, int64_t h, const bf16* w_v, Ahead ahead) const {
    if (h == 0) mix(chunk);
    const int64_t steps = round_up(chunk.count, kStep) / kStep;
    for (int64_t d = 0; d < values; d += kTile)
      transpose_words(
          steps * kTile, chunk.count,
          [&](int64_t i) { return Slot<bf16>{d + i < task.value_dim ? w_v + (d + i) * width() : nullptr, nullptr}; }, weights + d, values);
    for (int i = 0; i < count; ++i) {
      ahead(i);
      tile_products(tiles_of(groups[i].count), values / kTile, rows + h * pooled_stride + i * kStep * kWords, kTile * kWords, kTile, kWords,
                    weights, kTile * values, values, steps, chunk.column == 0, sums_of_values + (h * kBlock + i * kStep) * values, values);
    }
  }

  void finish() const {
    bf16* const to = static_cast<bf16*>(task.context) + (task.begin * task.heads + task.head_begin) * task.value_dim;
    const bf16* const biases = task.b_v == nullptr ? nullptr : static_cast<const bf16*>(task.b_v) + task.head_begin * task.value_dim;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t d = 0; d < task.value_dim; d += kTile) {
        const int n = int(least(task.value_dim - d, kTile));
        const Vec bias = biases == nullptr ? set1(0.0f) : load_n(biases + h * task.value_dim + d, n);
        for (int64_t w = 0; w < windows; ++w)
          store_n(to + (w * task.heads + h) * task.value_dim + d,
                  fma(load(sums_of_values + (h * kBlock + w) * values + d), set1(inverse[w * heads + h]), bias), n);
      }
  }
};

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
#endif
