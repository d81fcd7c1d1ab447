// The products of heads.h by vectors. Windows lie in the SIMD lanes; slots are transposed into them, and the weights are only ever
// broadcast.
//
// bfloat16 with AVX512_BF16 multiplies pairs of neighbours with vdpbf16ps: along the key dimension, the channels (scores),
// the slots (pooling), the channels again. Everything else is widened to float32. Sums and softmax are float32.
#pragma once

#include "cpu/attention_pool/heads.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// Words of channels per chunk; Zen 5, 784 windows, 16 heads of 72, ms in bfloat16 and float32: 96 24.4 and 52.0, 144 24.1 and 50.8,
// 192 25.2 and 53.5. A row of weights or slots begins a page, so short chunks pay for address translation; long ones leave L1.
constexpr int64_t kChunk = 144;

// Vectors of windows that share a pass over the weights, whose streaming costs 6 vectors (784 windows, 16 heads of 72, Zen 5)
// 63 ms in float32 where 9 take 58.7, 12 57.0, 17 53.5 and 24 53.0; in bfloat16 27.7, 26.8, 28.4, 24.5 and 25.2.
constexpr int64_t kPoolVectors = 18;

// inlined into one caller, the compiler spills their tiles: 34 ms instead of 28 for 784 windows in bfloat16
#define OUT_OF_LINE __attribute__((noinline))

// A part of a block: up to kMaxVectors vectors of windows, and its share of each array in the scratch.
struct Group {
  int vectors;
  int64_t begin, count;  // windows
  int64_t lanes_before;
  int64_t lanes() const { return vectors * kWidth; }
};

// Calls put(row, transposed vector) with the slots of a group's windows in the lanes.
template <typename T, class Load, class Put>
void transpose_slots(const PoolWindows& p, const Group& g, int64_t j, const Chunk& chunk, int64_t step, int64_t rows, Load load_row,
                     Put put) {
  for (int v = 0; v < g.vectors; ++v) {
    Slot<T> first[kWidth], second[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) {
      const int64_t lane = v * kWidth + i, window = g.begin + lane;
      const bool real = lane < g.count;
      first[i] = real ? slot_at<T>(p, window, j, chunk.layer, chunk.channel) : Slot<T>{nullptr, nullptr};
      second[i] = real && j + 1 < p.size ? slot_at<T>(p, window, j + 1, chunk.layer, chunk.channel) : Slot<T>{nullptr, nullptr};
    }
    for (int64_t row = 0; row < rows; row += kWidth) {
      Vec square[kWidth];
      for (int i = 0; i < kWidth; ++i) square[i] = load_row(first[i], second[i], row * step, chunk.count - row * step);
      transpose(square);
      for (int64_t i = 0; i < least(kWidth, rows - row); ++i) put(row + i, v, square[i]);
    }
  }
}

// x[word][slot][lane]: neighbours are channels.
template <class Maths, typename T>
void pack_channels(const PoolWindows& p, const Group& g, const Chunk& chunk, float* x) {
  const int64_t words = round_up(chunk.count, kRows) / Maths::pair, lanes = g.lanes();
  for (int64_t j = 0; j < p.size; ++j)
    transpose_slots<T>(
        p, g, j, chunk, Maths::pair, words,
        [](const Slot<T>& slot, const Slot<T>&, int64_t c, int64_t n) { return slot_words<Maths>(slot, c, n); },
        [&](int64_t word, int v, Vec row) { store(x + (word * p.size + j) * lanes + v * kWidth, row); });
}

// x[channel][slots / pair][lane]: neighbours are slots.
template <class Maths, typename T>
void pack_slots(const PoolWindows& p, const Group& g, const Chunk& chunk, float* x) {
  if constexpr (Maths::pair == 1) {
    pack_channels<Maths, T>(p, g, chunk, x);
  } else {
#if VLMKERN_BF16_PAIRS
    const int64_t pairs = (p.size + 1) / 2, lanes = g.lanes();
    for (int64_t j = 0; j < pairs; ++j)
      transpose_slots<T>(
          p, g, 2 * j, chunk, 1, round_up(chunk.count, 2),
          [](const Slot<T>& first, const Slot<T>& second, int64_t c, int64_t n) {
            return pair_up(slot_values(first, c, n), slot_values(second, c, n));
          },
          [&](int64_t c, int v, Vec row) { store(x + (c * pairs + j) * lanes + v * kWidth, row); });
#endif
  }
}

// s[slot][lanes] += (W_K,h^T q_h) . x_j over one chunk; weights [steps][stride].
template <class Maths, int vectors>
OUT_OF_LINE void score(const float* weights, int64_t stride, int64_t steps, const float* q, int64_t channels, const float* x, int64_t size,
                       float* s) {
  constexpr int64_t kLanes = vectors * kWidth;
  for (int64_t c = 0; c < channels; c += kRows, x += kRows / Maths::pair * size * kLanes) {
    Vec sum[kRows][vectors] = {};
    multiply<Maths, vectors>(sum, weights + c, 1, stride, q, steps);
    Vec words[kRows / Maths::pair][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows / Maths::pair; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        if constexpr (Maths::pair == 1) {
          words[r][v] = sum[r][v];
        } else {
#if VLMKERN_BF16_PAIRS
          words[r][v] = interleave(sum[2 * r][v], sum[2 * r + 1][v]);
#endif
        }
      }
    }
    for (int64_t j = 0; j < size; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        float* to = s + j * kLanes + v * kWidth;
        Vec total = load(to);
#pragma GCC unroll 8
        for (int r = 0; r < kRows / Maths::pair; ++r)
          total = Maths::multiply_add(words[r][v], load(x + (r * size + j) * kLanes + v * kWidth), total);
        store(to, total);
      }
    }
  }
}

// y[word][lanes] = sum_j p_j x_j over one chunk; `rows` of x per channel, known when `fixed` is not 0.
template <class Maths, int vectors, int fixed>
OUT_OF_LINE void pool(const float* p, const float* x, int64_t channels, int64_t rows, float* y) {
  constexpr int64_t kLanes = vectors * kWidth;
  if (fixed > 0) rows = fixed;
  for (int v = 0; v < vectors; ++v) {
    Vec weights[fixed > 0 ? fixed : 1];
    for (int j = 0; j < fixed; ++j) weights[j] = load(p + j * kLanes + v * kWidth);
    auto mix = [&](int64_t c) {
      const float* from = x + c * rows * kLanes + v * kWidth;
      Vec sum = set1(0.0f);
#pragma GCC unroll 4
      for (int64_t j = 0; j < rows; ++j)
        sum = Maths::multiply_add(fixed > 0 ? weights[j] : load(p + j * kLanes + v * kWidth), load(from + j * kLanes), sum);
      return sum;
    };
    for (int64_t c = 0; c < channels; c += Maths::pair) {
      float* to = y + c / Maths::pair * kLanes + v * kWidth;
      if constexpr (Maths::pair == 1) {
        store(to, mix(c));
      } else {
#if VLMKERN_BF16_PAIRS
        store(to, interleave(mix(c), mix(c + 1)));
#endif
      }
    }
  }
}

// o[row][lanes] += W_V,h y over one chunk
template <class Maths, int vectors>
OUT_OF_LINE void project(const float* weights, int64_t stride, int64_t rows, const float* y, int64_t steps, bool first, float* o) {
  constexpr int64_t kLanes = vectors * kWidth;
  for (int64_t d = 0; d < rows; d += kRows) {
    Vec sum[kRows][vectors] = {};
    multiply<Maths, vectors>(sum, weights + d * stride, stride, 1, y, steps);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        float* to = o + (d + r) * kLanes + v * kWidth;
        // each chunk is summed apart and then added: rounding grows with the chunk's length, not with all channels
        store(to, first ? sum[r][v] : load(to) + sum[r][v]);
      }
    }
  }
}

// The group's rows of the context of one head.
template <typename T>
void finish(const PoolHeads& task, const Group& g, int64_t head, const float* o, const float* inverse) {
  const int64_t lanes = g.lanes(), width = task.heads * task.value_dim;
  for (int v = 0; v < g.vectors; ++v) {
    const Vec scale = load(inverse + v * kWidth);
    const int64_t count = least(g.count - v * kWidth, kWidth);
    for (int64_t d = 0; d < task.value_dim; d += kWidth) {
      const int n = int(least(task.value_dim - d, kWidth));
      float bias[kWidth] = {};
      if (task.b_v) store(bias, load_n(static_cast<const T*>(task.b_v) + head * task.value_dim + d, n));
      Vec square[kWidth];
      for (int i = 0; i < kWidth; ++i)
        square[i] = i < n ? fma(load(o + (d + i) * lanes + v * kWidth), scale, set1(bias[i])) : set1(0.0f);
      transpose(square);
      for (int64_t i = 0; i < count; ++i)
        store_n(static_cast<T*>(task.context) + (g.begin + v * kWidth + i) * width + head * task.value_dim + d, square[i], n);
    }
  }
}

template <class M, typename T>
struct VectorHeads {
  using Maths = M;
  using Registers = NoRegisters;
  static constexpr int64_t kChannels = kChunk * Maths::pair, kBlock = kPoolVectors * kWidth;

  const PoolHeads& task;
  const PoolWindows& p;
  const int64_t heads;
  int64_t steps, value_rows, pooled_rows;  // words of a key's row; rows of a head's weights, padded; rows of x per channel
  float *q, *rows, *x, *s, *weights, *y, *o;
  Group groups[kPoolVectors];
  int count = 0;

  VectorHeads(const PoolHeads& task, float* memory) : task(task), p(task.windows), heads(task.head_end - task.head_begin) {
    place(memory);
    for (int64_t begin = task.begin; begin < task.end; ++count) {
      // a remainder of four vectors goes as two and two: a tile of one has too few sums to hide the latency of an add
      const int64_t left = (task.end - begin + kWidth - 1) / kWidth;
      const int vectors = left == 4 ? 2 : int(least(left, kMaxVectors));
      const int64_t windows = least(vectors * kWidth, task.end - begin);
      groups[count] = {vectors, begin, windows, begin - task.begin};
      begin += windows;
    }
  }

  // returns the words taken
  int64_t place(float* memory) {
    steps = round_up(task.key_dim, Maths::pair) / Maths::pair, value_rows = round_up(task.value_dim, kRows);
    pooled_rows = round_up(p.size, Maths::pair) / Maths::pair;
    int64_t taken = 0;
    auto take = [&](int64_t words) {
      float* here = memory == nullptr ? nullptr : memory + taken;
      taken += round_up(words, 16);  // each part starts on a cache line
      return here;
    };
    q = take(heads * steps * kBlock);
    rows = take(kWidth * steps);
    x = take(kChannels * pooled_rows * kBlock);
    s = take(heads * (p.size + 1) * kBlock);
    const int64_t key_words = steps * kChannels, value_words = value_rows * kChunk;
    weights = take(key_words > value_words ? key_words : value_words);
    y = take(kChunk * kMaxVectors * kWidth);
    o = take(heads * value_rows * kBlock);
    return taken;
  }
  static int64_t words(const PoolHeads& task) { return VectorHeads(task, nullptr).place(nullptr); }

  // a head's or a group's part of each array
  float* q_of(const Group& g, int64_t h) const { return q + (heads * g.lanes_before + h * g.lanes()) * steps; }
  float* s_of(const Group& g, int64_t h) const { return s + (heads * g.lanes_before + h * g.lanes()) * (p.size + 1); }
  float* o_of(const Group& g, int64_t h) const { return o + (heads * g.lanes_before + h * g.lanes()) * value_rows; }
  float* x_of(const Group& g) const { return x + kChannels * pooled_rows * g.lanes_before; }

  void pack_queries() const {
    for (int i = 0; i < count; ++i) {
      const Group& g = groups[i];
      for (int64_t h = 0; h < heads; ++h) {
        for (int v = 0; v < g.vectors; ++v) {
          const int64_t windows = least(kWidth, g.count - v * kWidth);
          for (int64_t w = 0; w < windows; ++w)
            pack_row<Maths>(static_cast<const T*>(task.q) + ((g.begin + v * kWidth + w) * task.heads + task.head_begin + h) * task.key_dim,
                            task.key_dim, steps, rows + w * steps);
          pack_lanes(rows, windows, steps, q_of(g, h) + v * kWidth, g.lanes(), 0);
        }
      }
      memset(static_cast<void*>(s_of(g, 0)), 0, heads * (p.size + 1) * g.lanes() * sizeof(float));
    }
  }
  void pack_channels(const Chunk& chunk) const {
    for (int i = 0; i < count; ++i) VLMKERN_ISA::pack_channels<Maths, T>(p, groups[i], chunk, x_of(groups[i]));
  }
  template <class Ahead>
  void score(const Chunk& chunk, int64_t h, const T* w_k, Ahead ahead) const {
    const int64_t stride = round_up(chunk.count, kWidth);
    pack_rows<Maths>(w_k, p.layers * p.channels, task.key_dim, chunk.count, steps * Maths::pair, stride, weights);
    for (int i = 0; i < count; ++i) {
      const Group& g = groups[i];
      ahead(i);
      by_vectors(g.vectors, [&](auto n) {
        VLMKERN_ISA::score<Maths, decltype(n)::value>(weights, stride, steps, q_of(g, h), round_up(chunk.count, kRows), x_of(g), p.size,
                                                      s_of(g, h));
      });
    }
  }
  void weigh() const {
    for (int i = 0; i < count; ++i) {
      const Group& g = groups[i];
      for (int64_t h = 0; h < heads; ++h)
        by_vectors(g.vectors, [&](auto n) { softmax<Maths, decltype(n)::value>(s_of(g, h), p.size, task.scale); });
    }
  }
  void pack_slots(const Chunk& chunk) const {
    for (int i = 0; i < count; ++i) VLMKERN_ISA::pack_slots<Maths, T>(p, groups[i], chunk, x_of(groups[i]));
  }
  template <class Ahead>
  void pool(const Chunk& chunk, int64_t h, const T* w_v, Ahead ahead) const {
    const int64_t width = p.layers * p.channels, words = round_up(chunk.count, Maths::pair) / Maths::pair;
    for (int64_t d = 0; d < value_rows; ++d) {
      float* to = weights + d * words;
      if (d < task.value_dim)
        pack_row<Maths>(w_v + d * width, chunk.count, words, to);
      else
        memset(static_cast<void*>(to), 0, words * sizeof(float));
    }
    for (int i = 0; i < count; ++i) {
      const Group& g = groups[i];
      ahead(i);
      by_vectors(g.vectors, [&](auto n) {
        constexpr int vectors = decltype(n)::value;
        if (p.size == 4)
          VLMKERN_ISA::pool<Maths, vectors, 4 / Maths::pair>(s_of(g, h), x_of(g), chunk.count, pooled_rows, y);
        else
          VLMKERN_ISA::pool<Maths, vectors, 0>(s_of(g, h), x_of(g), chunk.count, pooled_rows, y);
        project<Maths, vectors>(weights, words, value_rows, y, words, chunk.column == 0, o_of(g, h));
      });
    }
  }
  void finish() const {
    for (int i = 0; i < count; ++i) {
      const Group& g = groups[i];
      for (int64_t h = 0; h < heads; ++h)
        VLMKERN_ISA::finish<T>(task, g, task.head_begin + h, o_of(g, h), s_of(g, h) + p.size * g.lanes());
    }
  }
};

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
