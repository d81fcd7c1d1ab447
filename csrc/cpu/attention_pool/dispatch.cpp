#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/units.h"

namespace vlmkern {
namespace {

int64_t windows_of(int64_t cells, int64_t window) { return (cells + window - 1) / window; }

int64_t all_windows(const AttentionPool& p) {
  return p.tiles * windows_of(p.grid_rows, p.window_rows) * windows_of(p.grid_cols, p.window_cols);
}

void check(const AttentionPool& p, int threads) {
  require_dtype(p.dtype);
  require_threads(threads);
  require(p.layers >= 1, "features: expected layers at least 1");
  require(p.grid_rows >= 1 && p.grid_cols >= 1 && p.window_rows >= 1 && p.window_cols >= 1, "grid and window: expected at least 1 x 1");
  require_product("windows", {p.windows, p.window_rows, p.window_cols});
  require_product("features", {p.tiles, p.grid_rows, p.grid_cols, p.layers, p.channels});
  require_product("windows", {p.windows, p.layers, p.channels});
  // a slot's place is kept in 32 bits
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  require(p.tiles <= kMost && p.grid_rows <= kMost / p.grid_cols, "features: too many tiles or patches");
  require(p.window_rows <= kMost / p.window_cols, "window: too large");
  const int64_t patches = p.grid_rows * p.grid_cols;
  const bool reads = p.windows > 0 && p.channels > 0;
  require(p.features != nullptr, "features: null pointer");
  p.extents->require_tensors(p.layers + 3);
  for (int64_t i = 0; i < p.layers; ++i) {
    const PoolFeature& f = p.features[i];
    const std::string name = "features[" + std::to_string(i) + "]";
    const auto fits = [](int64_t stride, int64_t size) { return size <= 1 || (stride >= 0 && stride <= kLimit / size); };
    if (!fits(f.tile_stride, p.tiles) || !fits(f.patch_stride, patches))
      throw std::invalid_argument(name + ": got strides (" + std::to_string(f.tile_stride) + ", " + std::to_string(f.patch_stride) + ")");
    require(!reads || f.data, "null pointer for a tensor that has elements");
    if (reads) p.extents->require_reach(i, name, reach({{p.tiles, f.tile_stride}, {patches, f.patch_stride}}, p.channels));
  }
  require(!p.pad || !reads || p.pad_embed, "pad_embed: expected with pad");
  if (p.pad && reads) {
    p.extents->require_reach(p.layers, "pad", p.tiles * patches);
    p.extents->require_reach(p.layers + 1, "pad_embed", 2 * p.layers * p.channels);
  }
  if (p.keep == nullptr)
    require(p.windows == all_windows(p), "windows: expected all of the grid's");
  else
    p.extents->require_reach(p.layers + 2, "keep", p.windows);
}

// keep and pad are copied or read once, and checked after that: nobody can write to them in between.
std::vector<PoolSlot> find_slots(const AttentionPool& p) {
  const int64_t across = windows_of(p.grid_cols, p.window_cols), down = windows_of(p.grid_rows, p.window_rows);
  const int64_t patches = p.grid_rows * p.grid_cols, all = all_windows(p);
  std::vector<PoolSlot> slots(p.windows * p.window_rows * p.window_cols);
  std::vector<int64_t> keep(p.keep ? p.windows : 0);
  if (!keep.empty()) std::memcpy(keep.data(), p.keep, keep.size() * sizeof(int64_t));
  PoolSlot* next = slots.data();
  for (int64_t i = 0; i < p.windows; ++i) {
    const int64_t window = keep.empty() ? i : keep[i];
    if (window < 0 || window >= all)
      throw std::invalid_argument("keep: got " + std::to_string(window) + ", expected 0 to " + std::to_string(all - 1));
    const int64_t tile = window / (across * down), top = window / across % down * p.window_rows, left = window % across * p.window_cols;
    for (int64_t row = top; row < top + p.window_rows; ++row)
      for (int64_t col = left; col < left + p.window_cols; ++col, ++next) {
        const bool inside = row < p.grid_rows && col < p.grid_cols;
        const int64_t patch = inside ? row * p.grid_cols + col : -1;
        const int pad = inside && p.pad ? *static_cast<const volatile uint8_t*>(p.pad + tile * patches + patch) : 0;
        if (pad > 2) throw std::invalid_argument("pad: got " + std::to_string(pad) + ", expected 0, 1 or 2");
        *next = {int32_t(tile), int32_t(patch), pad};
      }
  }
  return slots;
}

PoolWindows windows_from(const AttentionPool& p, const std::vector<PoolSlot>& slots) {
  PoolWindows windows;
  windows.dtype = p.dtype, windows.features = p.features, windows.layers = p.layers, windows.channels = p.channels;
  windows.slots = slots.data(), windows.size = p.window_rows * p.window_cols, windows.pad_embed = p.pad_embed;
  return windows;
}

// windows per unit of work of the kernels that go by windows; a unit reads 600 KB at the released sizes in bfloat16
constexpr int64_t kWindowsPerUnit = 32;

}  // namespace

void attention_pool_mean(const AttentionPool& p, void* mean, int threads, const Extents& extents) {
  check(p, threads);
  extents.require_tensors(1);
  if (p.windows == 0 || p.channels == 0) return;
  require(mean, "null pointer for a tensor that has elements");
  extents.require_reach(0, "mean", p.windows * p.layers * p.channels);
  const std::vector<PoolSlot> slots = find_slots(p);
  const PoolWindows windows = windows_from(p, slots);
  const PoolMeanKernel& kernel = kernels().pool_mean_kernel;
  over_units(windows_of(p.windows, kWindowsPerUnit), threads, 0, [&](int64_t unit, void*) {
    kernel.run(windows, unit * kWindowsPerUnit, std::min(p.windows, (unit + 1) * kWindowsPerUnit), mean);
  });
}

void attention_pool_context(const AttentionPool& p, const void* q, const void* w_k, const void* w_v, const void* b_v, void* context,
                            int64_t heads, int64_t key_dim, int64_t value_dim, float scale, int threads, const Extents& extents) {
  check(p, threads);
  extents.require_tensors(5);
  require(heads >= 1 && key_dim >= 1 && value_dim >= 1, "heads, key_dim and value_dim: expected at least 1");
  require_product("weights", {heads, key_dim, p.layers, p.channels});
  require_product("weights", {heads, value_dim, p.layers, p.channels});
  require_product("q", {p.windows, heads, key_dim});
  require_product("context", {p.windows, heads, value_dim});
  require_product("scores", {heads, p.window_rows * p.window_cols + 1});
  if (p.windows == 0) return;
  require(q && context && (p.channels == 0 || (w_k && w_v)), "null pointer for a tensor that has elements");
  require(p.channels >= 1, "channels: expected at least 1");
  const int64_t width = p.layers * p.channels;
  extents.require_reach(0, "q", p.windows * heads * key_dim);
  extents.require_reach(1, "w_k", heads * key_dim * width);
  extents.require_reach(2, "w_v", heads * value_dim * width);
  extents.require_reach(3, "b_v", b_v ? heads * value_dim : 0);
  extents.require_reach(4, "context", p.windows * heads * value_dim);
  const std::vector<PoolSlot> slots = find_slots(p);
  const PoolHeadsKernel& kernel = kernels().pool_heads_kernel;

  PoolHeads all;
  all.windows = windows_from(p, slots);
  all.q = q, all.w_k = w_k, all.w_v = w_v, all.b_v = b_v, all.context = context;
  all.heads = heads, all.key_dim = key_dim, all.value_dim = value_dim, all.scale = scale;

  // one unit of work is a block of windows; with fewer blocks than threads, a share of its heads (which packs the
  // slots again). How the work is cut changes no result: each window and head is computed by itself, in the same order.
  const int64_t lanes = kernel.lanes, vectors = windows_of(p.windows, lanes);
  threads = usable_threads(threads);
  int64_t blocks = windows_of(p.windows, kernel.most(p.dtype));
  if (blocks > threads / 2) blocks = std::min(vectors, windows_of(blocks, threads) * threads);
  const int64_t shares = std::clamp<int64_t>(threads / blocks, 1, heads);
  all.begin = all.end = all.head_begin = 0, all.head_end = windows_of(heads, shares);
  const size_t scratch = kernel.scratch(all);
  over_units(blocks * shares, threads, scratch, [&](int64_t unit, void* mine) {
    const int64_t block = unit / shares, share = unit % shares;
    PoolHeads task = all;
    task.begin = vectors * block / blocks * lanes;
    task.end = std::min(p.windows, vectors * (block + 1) / blocks * lanes);
    task.head_begin = heads * share / shares, task.head_end = heads * (share + 1) / shares;
    kernel.run(task, mine);
  });
}

void attention_pool_slots(const AttentionPool& p, const void* q, void* pooled, float scale, int threads, const Extents& extents) {
  check(p, threads);
  extents.require_tensors(2);
  if (p.windows == 0 || p.channels == 0) return;
  require(q && pooled, "null pointer for a tensor that has elements");
  extents.require_reach(0, "q", p.windows * p.layers * p.channels);
  extents.require_reach(1, "pooled", p.windows * p.layers * p.channels);
  const std::vector<PoolSlot> slots = find_slots(p);
  const PoolWindows windows = windows_from(p, slots);
  const PoolSlotsKernel& kernel = kernels().pool_slots_kernel;
  const size_t scratch = windows.size * kernel.lanes * sizeof(float);
  over_units(windows_of(p.windows, kWindowsPerUnit), threads, scratch, [&](int64_t unit, void* mine) {
    kernel.run(windows, q, unit * kWindowsPerUnit, std::min(p.windows, (unit + 1) * kWindowsPerUnit), scale, mine, pooled);
  });
}

void attention_pool_slots_bwd(const PoolSlotsBwd& task, int threads, const Extents& extents) {
  require_dtype(task.dtype);
  require_threads(threads);
  require(task.size >= 1, "windows: expected a size at least 1");
  require_product("vectors", {task.windows, task.width});
  require_product("x", {task.windows, task.size, task.width});
  require_product("weights", {task.heads, 2, task.size});
  extents.require_tensors(2 + 2 * task.heads);
  if (task.windows == 0 || task.heads == 0 || task.width == 0) return;
  require(task.x && task.vectors && task.dx, "null pointer for a tensor that has elements");
  extents.require_reach(0, "x", task.windows * task.size * task.width);
  extents.require_reach(1, "dx", task.windows * task.size * task.width);
  for (int64_t i = 0; i < 2 * task.heads; ++i) {
    require(task.vectors[i], "vectors: null pointer for a tensor that has elements");
    extents.require_reach(2 + i, "vectors[" + std::to_string(i / 2) + "]", task.windows * task.width);
  }
  const PoolSlotsBwdKernel& kernel = kernels().pool_slots_bwd_kernel;
  over_units(windows_of(task.windows, kWindowsPerUnit), threads, kernel.scratch(task), [&](int64_t unit, void* mine) {
    kernel.run(task, unit * kWindowsPerUnit, std::min(task.windows, (unit + 1) * kWindowsPerUnit), mine);
  });
}

}  // namespace vlmkern
