// Attention pooling over windows of a patch grid: what the dispatcher hands to the kernels, and its entry points.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/dtype.h"

namespace vlmkern {

class Extents;  // cpu/check.h, which the kernels do without

// One hidden state [tiles, patches, channels]; strides in elements, the last is 1.
struct PoolFeature {
  const void* data;
  int64_t tile_stride, patch_stride;
};

// Where a slot of a window is read.
struct PoolSlot {
  int32_t tile;
  int32_t patch;  // -1: beyond the grid, a slot of zeros
  int32_t pad;    // 0, or 1 + the row of pad_embed that is added
};

// The windows' slots, as if the hidden states were concatenated along their channels.
struct PoolWindows {
  DType dtype;
  const PoolFeature* features;
  int64_t layers, channels;  // of one hidden state
  const PoolSlot* slots;     // [windows, size]
  int64_t size;
  const void* pad_embed;  // dense [2, layers * channels]
};

// The share of some windows and heads in softmax(q_h W_K,h x_j) x_j W_V,h + b_V,h.
struct PoolHeads {
  PoolWindows windows;
  const void* q;        // dense [windows, heads * key_dim]
  const void* w_k;      // dense [heads * key_dim, layers * channels]
  const void* w_v;      // dense [heads * value_dim, layers * channels]
  const void* b_v;      // [heads * value_dim] or null
  void* context;        // dense [windows, heads * value_dim]
  int64_t heads, key_dim, value_dim;
  float scale;
  int64_t begin, end;  // windows
  int64_t head_begin, head_end;
};

// Some heads of some windows; blocks of windows are multiples of `lanes`, but for the last.
struct PoolHeadsKernel {
  int64_t lanes;                        // windows per vector
  int64_t (*most)(DType);               // windows of a block, at most
  size_t (*scratch)(const PoolHeads&);  // bytes, 64-byte aligned, for any `most` windows and as many heads
  void (*run)(const PoolHeads&, void* scratch);
};

struct PoolMeanKernel {
  void (*run)(const PoolWindows&, int64_t begin, int64_t end, void* mean);
};

// One head. Scratch: `lanes` floats per slot of a window.
struct PoolSlotsKernel {
  int64_t lanes;
  void (*run)(const PoolWindows&, const void* q, int64_t begin, int64_t end, float scale, void* scratch, void* pooled);
};

struct PoolSlotsBwd;

// Windows begin to end of all.
struct PoolSlotsBwdKernel {
  size_t (*scratch)(const PoolSlotsBwd&);  // bytes, 64-byte aligned
  void (*run)(const PoolSlotsBwd&, int64_t begin, int64_t end, void* scratch);
};

// All arguments, as they come from Python.
struct AttentionPool {
  DType dtype;
  const PoolFeature* features;
  int64_t layers, tiles, channels;
  int64_t grid_rows, grid_cols, window_rows, window_cols;
  const uint8_t* pad;  // dense [tiles, patches]: 0, or 1 + the row of pad_embed that is added; or null
  const void* pad_embed;
  const int64_t* keep;  // which windows, or null for all of them
  int64_t windows;
  const Extents* extents;  // of the features, pad, pad_embed and keep
};

// The gradients' part between the products with weights, see backward.cpp. Everything is dense.
struct PoolSlotsBwd {
  DType dtype;
  const void* x;         // [windows, size, width], the slots as they are attended to
  void* const* vectors;  // 2 * heads of [windows, width]: a and b of each head in, y and pooled out
  float* dx;             // [windows, size, width], added to
  int64_t windows, heads, size, width;
  float scale;
};

// All throw std::invalid_argument on sizes, strides, indices, pointers or extents that cannot be; they write nothing before
// that. Extents are those of the pointers that a function is given, in their order.

// The means of the windows' slots, dense [windows, layers * channels].
void attention_pool_mean(const AttentionPool& problem, void* mean, int threads, const Extents& extents);

// Many heads: the attended values of all heads, dense [windows, heads * value_dim], from q [windows, heads * key_dim].
void attention_pool_context(const AttentionPool& problem, const void* q, const void* w_k, const void* w_v, const void* b_v, void* context,
                            int64_t heads, int64_t key_dim, int64_t value_dim, float scale, int threads, const Extents& extents);

// One head, its query projected into the slots' space: softmax_j(scale * q . x_j) x_j, dense [windows, layers * channels].
void attention_pool_slots(const AttentionPool& problem, const void* q, void* pooled, float scale, int threads, const Extents& extents);

// Extents of x, dx and the vectors.
void attention_pool_slots_bwd(const PoolSlotsBwd& task, int threads, const Extents& extents);

}  // namespace vlmkern
