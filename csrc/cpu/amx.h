// AMX's tile instructions, or the same in plain C++ where a source is compiled to be tested on CPUs without them.
//
// Eight tiles of 16 rows of 16 words. A product takes tiles a [16 rows][16 words] and b [16 words][16 columns], words being pairs
// of bfloat16, and adds to d [16 rows][16 columns] of float32: 16,384 FLOPs an instruction, a rate of 3.5 TFLOP/s a core (Sapphire
// Rapids), 16 cycles each, which is what 8 rows take too. Denormals count as zero; NaN and infinity pass. Intel SDM, volume 1, chapter 18.
#pragma once

#include "cpu/tile.h"

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

// The tiles are this thread's while one of these lives. Tiles 0 to 3 hold sums, 4 and 5 what is a in a product, 6 and 7 what is b.
class Tiles {
 public:
  Tiles() { set_words(kTile); }
  ~Tiles() { __asm__ volatile("tilerelease" ::); }
  Tiles(const Tiles&) = delete;

  // How many words products sum over from now on, at most 16: rows of a and columns of b are that short, and read as such.
  static void set_words(int64_t words) {
    const uint16_t row = uint16_t(4 * words);
    const uint8_t rows_of_b = uint8_t(words);
    struct alignas(64) {
      uint8_t palette, start, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } const layout = {1, 0, {}, {64, 64, 64, 64, row, row, 64, 64}, {16, 16, 16, 16, 16, 16, rows_of_b, rows_of_b}};
    static_assert(sizeof layout == 64);
    __asm__ volatile("ldtilecfg %0" ::"m"(layout));
  }
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
inline thread_local int64_t emulated_words = 0;

class Tiles {
 public:
  Tiles() { set_words(kTile); }
  ~Tiles() { set_words(0); }
  Tiles(const Tiles&) = delete;

  static void set_words(int64_t words) {
    emulated_words = words;
    // what is read before it is written shows
    memset(static_cast<void*>(emulated_tiles), 0xff, sizeof emulated_tiles);
  }
};

template <int tile>
inline void tile_zero() {
  memset(static_cast<void*>(emulated_tiles[tile]), 0, sizeof emulated_tiles[tile]);
}
template <int tile>
inline void tile_load(const float* from, int64_t stride) {
  const int64_t rows = tile < 6 ? kTile : emulated_words, words = tile == 4 || tile == 5 ? emulated_words : kTile;
  for (int64_t row = 0; row < rows; ++row) memcpy(emulated_tiles[tile][row], from + row * stride, words * sizeof(float));
}
template <int tile>
inline void tile_store(float* to, int64_t stride) {
  for (int row = 0; row < kTile; ++row) memcpy(to + row * stride, emulated_tiles[tile][row], sizeof emulated_tiles[tile][row]);
}
template <int d, int a, int b>
inline void tile_multiply() {
  static_assert(d != a && d != b && a != b, "the instruction does not exist");
  for (int64_t word = 0; word < emulated_words; ++word) {
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

// The same of any number of tiles.
inline void tile_products(int64_t rows, int64_t columns, const float* a, int64_t a_tile, int64_t a_step, int64_t a_row, const float* b,
                          int64_t b_step, int64_t b_row, int64_t steps, bool first, float* sums, int64_t sums_row) {
  for (int64_t i = 0; i < rows; i += 2, a += 2 * a_tile, sums += 2 * kTile * sums_row)
    for (int64_t j = 0; j < columns; j += 2) {
      auto product = [&](auto m, auto n) {
        tile_product<decltype(m)::value, decltype(n)::value>(a, a_tile, a_step, a_row, b + j * kTile, b_step, b_row, steps, first,
                                                             sums + j * kTile, sums_row);
      };
      const bool two = j + 1 < columns;
      if (i + 1 < rows)
        two ? product(Int<2>(), Int<2>()) : product(Int<2>(), Int<1>());
      else
        two ? product(Int<1>(), Int<2>()) : product(Int<1>(), Int<1>());
    }
}

// 32 sums rounded to 16 words.
inline void round_sums(const float* sums, float* words) {
#if defined(__AVX512BF16__)
  _mm512_storeu_ps(words, _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(load(sums + kTile).v, load(sums).v)));
#else
  store_halves(words, load(sums));
  store_halves(words + kTile / 2, load(sums + kTile));
#endif
}

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
#endif
