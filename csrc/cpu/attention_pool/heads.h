// Attention pooling by weight absorption, over products that vectors or tiles compute. Keys and values of single slots are never
// made: with slots x_j of a window,
//
//     scores_j = (W_K,h^T q_h) . x_j        (a key bias adds the same to all slots: it drops out of the softmax)
//     context_h = W_V,h (sum_j p_j x_j) + b_V,h
//
// so the two products with weights are per window, not per slot. Both run over chunks of channels: a chunk's slots are packed once
// and serve every head, and neither W_K,h^T q_h nor the pooled slots of more than one chunk exist at a time.
//
// Per window and head: 2 * channels * (key_dim + value_dim + 2 * slots) FLOPs, channels being those of all hidden states.
//
// `Products` packs operands into scratch and multiplies. `h` counts the task's heads, which come in order; `weights` are those of
// head and chunk, rows of all channels; `ahead(i)` is called before each of the groups:
//     kChannels                                 of a chunk, at most
//     Registers                                 what a thread must hold while it multiplies
//     Products(task, memory), words(task)       in 32-bit words of scratch, and how many it takes
//     groups, count                             parts of the block that products take at a time: the first window of each, and how many
//     pack_queries()
//     pack_channels(chunk)                      slots as scores take them
//     score(chunk, h, weights, ahead)           after the last head, every score has taken in the chunk
//     weigh()                                   softmax
//     pack_slots(chunk)                         slots as pooling takes them
//     pool(chunk, h, weights, ahead)            W_V,h (sum_j p_j x_j) takes in the chunk
//     finish()                                  writes the context
#pragma once

#include "cpu/attention_pool/attention_pool.h"
#include "cpu/attention_pool/slots.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

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

// The same of one part of some windows' slots.
template <typename T>
void prefetch_slots(const PoolWindows& p, int64_t begin, int64_t count, const Chunk& chunk, int64_t part, int64_t parts) {
  const int64_t slots = count * p.size;
  for (int64_t i = slots * part / parts; i < slots * (part + 1) / parts; ++i) {
    const Slot<T> slot = slot_at<T>(p, begin, i, chunk.layer, chunk.channel);
    if (slot.x != nullptr) prefetch_rows(slot.x, 0, 0, 1, chunk.count);
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

template <class Products, typename T>
void pool_heads(const PoolHeads& task, void* memory) {
  constexpr int64_t kChannels = Products::kChannels;
  const PoolWindows& p = task.windows;
  const int64_t heads = task.head_end - task.head_begin, width = p.layers * p.channels;
  const int64_t chunks_per_layer = (p.channels + kChannels - 1) / kChannels, chunks = p.layers * chunks_per_layer;
  const Products products(task, static_cast<float*>(memory));
  const typename Products::Registers registers;

  auto chunk_at = [&](int64_t i) {
    const int64_t layer = i / chunks_per_layer, c = i % chunks_per_layer * kChannels;
    return Chunk{layer, c, least(kChannels, p.channels - c), layer * p.channels + c};
  };
  // calls pack(chunk), and for each head multiply(chunk, head, weights, ahead), of weights with `dim` rows a head
  auto over_chunks = [&](const void* w, int64_t dim, auto pack, auto multiply) {
    const T* const all = static_cast<const T*>(w) + task.head_begin * dim * width;
    for (int64_t k = 0; k < chunks; ++k) {
      const Chunk chunk = chunk_at(k), next = chunk_at((k + 1) % chunks);
      pack(chunk);
      for (int64_t h = 0; h < heads; ++h) {
        // while a group is worked on, a part of what comes next is fetched: the next head's weights, the next chunk's slots
        auto ahead = [&](int i) {
          const bool last = h + 1 == heads;
          const T* from = all + (last ? 0 : h + 1) * dim * width + (last ? next : chunk).column;
          prefetch_rows(from, width, dim * i / products.count, dim * (i + 1) / products.count, (last ? next : chunk).count);
          prefetch_slots<T>(p, products.groups[i].begin, products.groups[i].count, next, h, heads);
        };
        multiply(chunk, h, all + h * dim * width + chunk.column, ahead);
      }
    }
  };

  products.pack_queries();
  over_chunks(
      task.w_k, task.key_dim, [&](const Chunk& chunk) { products.pack_channels(chunk); },
      [&](const Chunk& chunk, int64_t h, const T* weights, auto ahead) { products.score(chunk, h, weights, ahead); });
  products.weigh();
  over_chunks(
      task.w_v, task.value_dim, [&](const Chunk& chunk) { products.pack_slots(chunk); },
      [&](const Chunk& chunk, int64_t h, const T* weights, auto ahead) { products.pool(chunk, h, weights, ahead); });
  products.finish();
}

}  // namespace
}  // namespace VLMKERN_ISA
}  // namespace vlmkern
