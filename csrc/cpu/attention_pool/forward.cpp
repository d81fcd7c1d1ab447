// Attention pooling by weight absorption. Keys and values of single slots are never made: with slots x_j of a window,
//
//     scores_j = (W_K,h^T q_h) . x_j        (a key bias adds the same to all slots: it drops out of the softmax)
//     context_h = W_V,h (sum_j p_j x_j) + b_V,h
//
// so the two products with weights are per window, not per slot. Windows lie in the SIMD lanes; the weights are only
// ever broadcast. Both products run over chunks of channels: a chunk's slots are transposed into the lanes once and
// serve every head, and neither W_K,h^T q_h nor the pooled slots of more than one chunk exist at a time.
//
// Per window and head: 2 * channels * (key_dim + value_dim + 2 * slots) FLOPs, channels being those of all hidden states.
//
// bfloat16 with AVX512_BF16 multiplies pairs of neighbours with vdpbf16ps: along the key dimension, the channels (scores),
// the slots (pooling), the channels again. Everything else is widened to float32. Sums and softmax are float32.
#include "cpu/attention_pool/attention_pool.h"

#include "cpu/attention_pool/slots.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// Words of channels per chunk; Zen 5, 784 windows, 16 heads of 72, ms in bfloat16 and float32: 96 24.4 and 52.0, 144 24.1 and 50.8,
// 192 25.2 and 53.5. A row of weights or slots begins a page, so short chunks pay for address translation; long ones leave L1.
constexpr int64_t kChunk = 144;

// inlined into one caller, the compiler spills their tiles: 34 ms instead of 28 for 784 windows in bfloat16
#define OUT_OF_LINE __attribute__((noinline))

// A part of a block: up to kMaxVectors vectors of windows, and its share of each array in the scratch.
struct Group {
  int vectors;
  int64_t begin, count;  // windows
  int64_t lanes_before;
  int64_t lanes() const { return vectors * kWidth; }
};

// A chunk of channels, all of one hidden state.
struct Chunk {
  int64_t layer, channel, count;
  int64_t column;  // in the weights
};

constexpr int64_t kLine = 64;

// Rows begin to end of a matrix, on their way to L2: rows of a chunk are too short for the hardware to run ahead.
template <typename T>
void prefetch_rows(const T* from, int64_t stride, int64_t begin, int64_t end, int64_t count) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t at = 0; at < count; at += kLine / int64_t(sizeof(T))) __builtin_prefetch(from + row * stride + at, 0, 2);
}

// The same of one part of a group's slots.
template <typename T>
void prefetch_slots(const PoolWindows& p, const Group& g, const Chunk& chunk, int64_t part, int64_t parts) {
  const int64_t slots = g.count * p.size;
  for (int64_t i = slots * part / parts; i < slots * (part + 1) / parts; ++i) {
    const Slot<T> slot = slot_at<T>(p, g.begin, i, chunk.layer, chunk.channel);
    if (slot.x != nullptr) prefetch_rows(slot.x, 0, 0, 1, chunk.count);
  }
}

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

// Scores [size][lanes] become weights in the layout of the pooling, and one over their sum at s[size].
template <class Maths, int vectors>
void softmax(float* s, int64_t size, float scale) {
  constexpr int64_t kLanes = vectors * kWidth;
  const SignedScale parts(scale);
  const Vec before = set1(parts.before), after = set1(parts.after * kLog2e);
  for (int v = 0; v < vectors; ++v) {
    float* mine = s + v * kWidth;
    Vec highest = set1(-kInfinity), sum = set1(0.0f);
    for (int64_t j = 0; j < size; ++j) highest = max(highest, load(mine + j * kLanes) * before);
    auto weight = [&](int64_t j) { return exp2_nonpositive<Maths::exp2_degree>((load(mine + j * kLanes) * before - highest) * after); };
    for (int64_t j = 0; j < size; j += Maths::pair) {
      if constexpr (Maths::pair == 1) {
        const Vec first = weight(j);
        sum = sum + first;
        store(mine + j * kLanes, first);
      } else {
#if VLMKERN_BF16_PAIRS
        // summed as they were rounded, so that they add up to one
        const Vec words = interleave(weight(j), j + 1 < size ? weight(j + 1) : set1(0.0f));
        sum = Maths::multiply_add(words, ones_of_pairs(), sum);
        store(mine + j / 2 * kLanes, words);
#endif
      }
    }
    store(mine + size * kLanes, set1(1.0f) / sum);
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

template <class Maths>
struct Scratch {
  int64_t steps, value_rows;  // words of a key's row; rows of a head's weights, padded
  int64_t q, rows, x, s, weights, y, o, words = 0;  // where each part begins; all of them

  Scratch(int64_t size, int64_t heads, int64_t key_dim, int64_t value_dim)
      : steps(round_up(key_dim, Maths::pair) / Maths::pair), value_rows(round_up(value_dim, kRows)) {
    constexpr int64_t kLanes = kPoolVectors * kWidth, kChannels = kChunk * Maths::pair;
    auto take = [&](int64_t count) {
      const int64_t here = words;
      words += round_up(count, 16);  // each part starts on a cache line
      return here;
    };
    q = take(heads * steps * kLanes);
    rows = take(kWidth * steps);
    x = take(kChannels * (round_up(size, Maths::pair) / Maths::pair) * kLanes);
    s = take(heads * (size + 1) * kLanes);
    const int64_t key_words = steps * kChannels, value_words = value_rows * kChunk;
    weights = take(key_words > value_words ? key_words : value_words);
    y = take(kChunk * kMaxVectors * kWidth);
    o = take(heads * value_rows * kLanes);
  }
};

template <class Maths, typename T>
void pool_heads(const PoolHeads& task, void* memory) {
  constexpr int64_t kChannels = kChunk * Maths::pair;
  const PoolWindows& p = task.windows;
  const int64_t heads = task.head_end - task.head_begin, width = p.layers * p.channels;
  const Scratch<Maths> scratch(p.size, heads, task.key_dim, task.value_dim);
  const int64_t steps = scratch.steps, value_rows = scratch.value_rows, pooled_rows = round_up(p.size, Maths::pair) / Maths::pair;
  float* const base = static_cast<float*>(memory);
  float *const rows = base + scratch.rows, *const weights = base + scratch.weights, *const y = base + scratch.y;
  // a head's or a group's part of each array
  auto q_of = [&](const Group& g, int64_t h) { return base + scratch.q + (heads * g.lanes_before + h * g.lanes()) * steps; };
  auto s_of = [&](const Group& g, int64_t h) { return base + scratch.s + (heads * g.lanes_before + h * g.lanes()) * (p.size + 1); };
  auto o_of = [&](const Group& g, int64_t h) { return base + scratch.o + (heads * g.lanes_before + h * g.lanes()) * value_rows; };
  auto x_of = [&](const Group& g) { return base + scratch.x + kChannels * pooled_rows * g.lanes_before; };

  Group groups[kPoolVectors];
  int count = 0;
  for (int64_t begin = task.begin; begin < task.end; ++count) {
    // a remainder of four vectors goes as two and two: a tile of one has too few sums to hide the latency of an add
    const int64_t left = (task.end - begin + kWidth - 1) / kWidth;
    const int vectors = left == 4 ? 2 : int(least(left, kMaxVectors));
    const int64_t windows = least(vectors * kWidth, task.end - begin);
    groups[count] = {vectors, begin, windows, begin - task.begin};
    begin += windows;
  }
  const int64_t chunks_per_layer = (p.channels + kChannels - 1) / kChannels, chunks = p.layers * chunks_per_layer;
  auto chunk_at = [&](int64_t i) {
    const int64_t layer = i / chunks_per_layer, c = i % chunks_per_layer * kChannels;
    return Chunk{layer, c, least(kChannels, p.channels - c), layer * p.channels + c};
  };
  // while a group is worked on, a part of what comes next is fetched: the next head's weights, the next chunk's slots
  auto prefetch = [&](const void* w, int64_t dim, int64_t h, int i, const Chunk& chunk, const Chunk& next) {
    const bool last = h + 1 == heads;
    const T* from = static_cast<const T*>(w) + (task.head_begin + (last ? 0 : h + 1)) * dim * width + (last ? next : chunk).column;
    prefetch_rows(from, width, dim * i / count, dim * (i + 1) / count, (last ? next : chunk).count);
    prefetch_slots<T>(p, groups[i], next, h, heads);
  };

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

  for (int64_t k = 0; k < chunks; ++k) {
    const Chunk chunk = chunk_at(k), next = chunk_at((k + 1) % chunks);
    const int64_t stride = round_up(chunk.count, kWidth);
    for (int i = 0; i < count; ++i) pack_channels<Maths, T>(p, groups[i], chunk, x_of(groups[i]));
    for (int64_t h = 0; h < heads; ++h) {
      const T* w_k = static_cast<const T*>(task.w_k) + (task.head_begin + h) * task.key_dim * width + chunk.column;
      pack_rows<Maths>(w_k, width, task.key_dim, chunk.count, steps * Maths::pair, stride, weights);
      for (int i = 0; i < count; ++i) {
        const Group& g = groups[i];
        prefetch(task.w_k, task.key_dim, h, i, chunk, next);
        by_vectors(g.vectors, [&](auto n) {
          score<Maths, decltype(n)::value>(weights, stride, steps, q_of(g, h), round_up(chunk.count, kRows), x_of(g), p.size, s_of(g, h));
        });
      }
    }
  }

  for (int i = 0; i < count; ++i) {
    const Group& g = groups[i];
    for (int64_t h = 0; h < heads; ++h)
      by_vectors(g.vectors, [&](auto n) { softmax<Maths, decltype(n)::value>(s_of(g, h), p.size, task.scale); });
  }

  for (int64_t k = 0; k < chunks; ++k) {
    const Chunk chunk = chunk_at(k), next = chunk_at((k + 1) % chunks);
    const int64_t words = round_up(chunk.count, Maths::pair) / Maths::pair;
    for (int i = 0; i < count; ++i) pack_slots<Maths, T>(p, groups[i], chunk, x_of(groups[i]));
    for (int64_t h = 0; h < heads; ++h) {
      const T* w_v = static_cast<const T*>(task.w_v) + (task.head_begin + h) * task.value_dim * width + chunk.column;
      for (int64_t d = 0; d < value_rows; ++d) {
        float* to = weights + d * words;
        if (d < task.value_dim)
          pack_row<Maths>(w_v + d * width, chunk.count, words, to);
        else
          memset(static_cast<void*>(to), 0, words * sizeof(float));
      }
      for (int i = 0; i < count; ++i) {
        const Group& g = groups[i];
        prefetch(task.w_v, task.value_dim, h, i, chunk, next);
        by_vectors(g.vectors, [&](auto n) {
          constexpr int vectors = decltype(n)::value;
          if (p.size == 4)
            pool<Maths, vectors, 4 / Maths::pair>(s_of(g, h), x_of(g), chunk.count, pooled_rows, y);
          else
            pool<Maths, vectors, 0>(s_of(g, h), x_of(g), chunk.count, pooled_rows, y);
          project<Maths, vectors>(weights, words, value_rows, y, words, chunk.column == 0, o_of(g, h));
        });
      }
    }
  }

  for (int i = 0; i < count; ++i) {
    const Group& g = groups[i];
    for (int64_t h = 0; h < heads; ++h)
      finish<T>(task, g, task.head_begin + h, o_of(g, h), s_of(g, h) + p.size * g.lanes());
  }
}

size_t scratch_bytes(DType dtype, int64_t size, int64_t heads, int64_t key_dim, int64_t value_dim) {
#if VLMKERN_BF16_PAIRS
  if (dtype == DType::bf16) return Scratch<Bf16Pairs>(size, heads, key_dim, value_dim).words * sizeof(float);
#endif
  (void)dtype;
  return Scratch<Float32>(size, heads, key_dim, value_dim).words * sizeof(float);
}

void run_heads(const PoolHeads& task, void* scratch) {
  switch (task.windows.dtype) {
    case DType::f32: return pool_heads<Float32, float>(task, scratch);
#if VLMKERN_BF16_PAIRS
    case DType::bf16: return pool_heads<Bf16Pairs, bf16>(task, scratch);
#else
    case DType::bf16: return pool_heads<Float32, bf16>(task, scratch);
#endif
    case DType::f16: return pool_heads<Float32, f16>(task, scratch);
  }
}

}  // namespace

extern const PoolHeadsKernel pool_heads_kernel{kWidth, scratch_bytes, run_heads};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
