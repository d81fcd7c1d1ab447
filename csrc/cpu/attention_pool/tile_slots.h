// Slots of windows as AMX's tiles take them, for attention pooling and its gradients: as columns, transposed, or in pairs of rows.
#pragma once

#include "cpu/amx.h"
#include "cpu/attention_pool/slots.h"

#if VLMKERN_TILES
namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

static_assert(kWidth == kTile);

inline int64_t tiles_of(int64_t n) { return round_up(n, kTile) / kTile; }

// The windows of a panel, whose slots are columns: as many as fill a tile, or one that takes several.
inline int64_t panel_windows(int64_t size) { return size < kTile ? kTile / size : 1; }

// 16 slots, or any rows of channels, in the lanes: to[word * stride + lane], `words` of them, zero beyond `channels`.
template <class SlotOf>
void transpose_words(int64_t words, int64_t channels, SlotOf slot_of, float* to, int64_t stride) {
  Slot<bf16> slots[kTile];
  for (int i = 0; i < kTile; ++i) slots[i] = slot_of(i);
  for (int64_t word = 0; word < words; word += kTile) {
    Vec square[kTile];
    for (int i = 0; i < kTile; ++i) square[i] = slot_words<Bf16Pairs>(slots[i], 2 * word, channels - 2 * word);
    transpose(square);
    for (int i = 0; i < kTile; ++i) store(to + (word + i) * stride, square[i]);
  }
}

// Pairs of slots: to[pair * stride + channel], zero from `channels` to the next multiple of two tiles' columns.
template <class SlotOf>
void pack_pairs(int64_t pairs, int64_t channels, SlotOf slot_of, float* to, int64_t stride) {
  for (int64_t j = 0; j < pairs; ++j) {
    const Slot<bf16> first = slot_of(2 * j), second = slot_of(2 * j + 1);
    for (int64_t c = 0; c < round_up(channels, 2 * kTile); c += kTile)
      store(to + j * stride + c, pair_up(slot_values(first, c, channels - c), slot_values(second, c, channels - c)));
  }
}

// Sums over a window's slots in pairs, which are few: so are the words of the tiles, lest the rest be zeros.
struct SlotPairs {
  int64_t steps, step_words;
  explicit SlotPairs(int64_t size) {
    const int64_t pairs = (size + 1) / 2;
    steps = tiles_of(pairs), step_words = (pairs + steps - 1) / steps;
  }
  int64_t words() const { return steps * step_words; }

  // sums[row][32 channels] = weights[row][word] by x[word][channel], rows of x `stride` words apart; tiles have step_words words.
  void multiply(int64_t rows, const float* weights, const float* x, int64_t stride, float* sums) const {
    tile_products(tiles_of(rows), 2, weights, kTile * words(), step_words, words(), x, step_words * stride, stride, steps, true, sums,
                  2 * kTile);
  }
};

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
#endif
