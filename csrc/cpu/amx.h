// AMX's tile instructions, or the same in plain C++ where a source is compiled to be tested on CPUs without them.
//
// Eight tiles of 16 rows of 16 words. A product takes tiles a [16 rows][16 words] and b [16 words][16 columns], words being pairs
// of bfloat16, and adds to d [16 rows][16 columns] of float32: 16,384 FLOPs an instruction, a rate of 3.5 TFLOP/s a core (Sapphire
// Rapids). Denormals count as zero; NaN and infinity pass. Intel SDM, volume 1, chapter 18.
#pragma once

#include "cpu/vec.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
#define VLMKERN_TILES 1
#elif VLMKERN_EMULATE_TILES
#define VLMKERN_TILES 1
#else
#define VLMKERN_TILES 0
#endif

#if VLMKERN_TILES
namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

constexpr int kTile = 16;                  // rows of a tile, and words of a row
constexpr int kTileWords = kTile * kTile;

#if defined(__AMX_BF16__)

// The tiles are this thread's while one of these lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    static_assert(sizeof layout == 64);
    __asm__ volatile("ldtilecfg %0" ::"m"(layout));
  }
  ~Tiles() { __asm__ volatile("tilerelease" ::); }
  Tiles(const Tiles&) = delete;
};

template <int tile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Rows `stride` words apart.
template <int tile>
inline void tile_load(const float* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride * 4), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(float* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * 4), "i"(tile) : "memory");
}
// d += a b
template <int d, int a, int b>
inline void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(d), "i"(a), "i"(b));
}

#else

inline thread_local float emulated_tiles[8][kTile][kTile];

class Tiles {
 public:
  // what is read before it is written shows
  Tiles() { memset(static_cast<void*>(emulated_tiles), 0xff, sizeof emulated_tiles); }
  ~Tiles() { memset(static_cast<void*>(emulated_tiles), 0xff, sizeof emulated_tiles); }
  Tiles(const Tiles&) = delete;
};

template <int tile>
inline void tile_zero() {
  memset(static_cast<void*>(emulated_tiles[tile]), 0, sizeof emulated_tiles[tile]);
}
template <int tile>
inline void tile_load(const float* from, int64_t stride) {
  for (int row = 0; row < kTile; ++row) memcpy(emulated_tiles[tile][row], from + row * stride, sizeof emulated_tiles[tile][row]);
}
template <int tile>
inline void tile_store(float* to, int64_t stride) {
  for (int row = 0; row < kTile; ++row) memcpy(to + row * stride, emulated_tiles[tile][row], sizeof emulated_tiles[tile][row]);
}
template <int d, int a, int b>
inline void tile_multiply() {
  static_assert(d != a && d != b && a != b, "the instruction does not exist");
  for (int word = 0; word < kTile; ++word) {
    float low[kTile], high[kTile];
    for (int column = 0; column < kTile; ++column) split_pair(emulated_tiles[b][word][column], low[column], high[column]);
    for (int row = 0; row < kTile; ++row) {
      float first, second;
      split_pair(emulated_tiles[a][row][word], first, second);
      for (int column = 0; column < kTile; ++column) emulated_tiles[d][row][column] += first * low[column] + second * high[column];
    }
  }
}

#endif

// Sums of up to two tiles of rows by two of columns, which takes all eight tiles:
//     sums[16 i + row][16 j + column] (+)= sum over steps of a[i][step] b[step][j]     for i below `rows` and j below `columns`
// Tile (i, step) of a begins at a + i * a_tile + step * a_step, its rows a_row words apart; tile (step, j) of b at
// b + step * b_step + 16 j, its rows b_row apart; rows of sums are sums_row apart.
template <int rows, int columns>
inline void tile_product(const float* a, int64_t a_tile, int64_t a_step, int64_t a_row, const float* b, int64_t b_step, int64_t b_row,
                         int64_t steps, bool first, float* sums, int64_t sums_row) {
  float *const right = sums + kTile, *const below = sums + kTile * sums_row, *const corner = below + kTile;
  if (first) {
    tile_zero<0>();
    if constexpr (columns == 2) tile_zero<1>();
    if constexpr (rows == 2) tile_zero<2>();
    if constexpr (rows == 2 && columns == 2) tile_zero<3>();
  } else {
    tile_load<0>(sums, sums_row);
    if constexpr (columns == 2) tile_load<1>(right, sums_row);
    if constexpr (rows == 2) tile_load<2>(below, sums_row);
    if constexpr (rows == 2 && columns == 2) tile_load<3>(corner, sums_row);
  }
  for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
    tile_load<4>(a, a_row);
    tile_load<6>(b, b_row);
    tile_multiply<0, 4, 6>();
    if constexpr (columns == 2) {
      tile_load<7>(b + kTile, b_row);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (rows == 2) {
      tile_load<5>(a + a_tile, a_row);
      tile_multiply<2, 5, 6>();
      if constexpr (columns == 2) tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(sums, sums_row);
  if constexpr (columns == 2) tile_store<1>(right, sums_row);
  if constexpr (rows == 2) tile_store<2>(below, sums_row);
  if constexpr (rows == 2 && columns == 2) tile_store<3>(corner, sums_row);
}

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
#endif
