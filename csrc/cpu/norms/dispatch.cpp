#include "cpu/norms/norms.h"

#include <algorithm>

#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/units.h"

namespace vlmkern {
namespace {

// below this many elements waking a second thread costs more than it saves
constexpr int64_t kElementsPerThread = 1 << 15;
// of the forward, rows that a thread takes at a time
constexpr int64_t kElementsPerUnit = 1 << 14;
// Shares of the gradients by weight and bias: as many as there may be threads, each of at least some rows, so that to
// sum them up is little beside the rows. They depend on the rows alone, so that sums are the same for all threads.
constexpr int64_t kShares = 64, kRowsPerShare = 16;

int64_t rows_of(const NormShape& n) { return n.outer * n.middle * n.inner; }

using Floats = std::unique_ptr<float, Free>;

Floats floats(int64_t count) {
  const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
  Floats memory(static_cast<float*>(std::aligned_alloc(kAlignment, bytes)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// [cols] in float32; null for null
Floats widened(DType dtype, const void* from, float offset, int64_t cols) {
  if (!from) return nullptr;
  Floats to = floats(cols);
  kernels().norm_fwd_kernel.widen(dtype, from, offset, to.get(), cols);
  return to;
}

void require_shape(DType dtype, const NormShape& n, int threads) {
  require_dtype(dtype);
  require_threads(threads);
  require_product("shape", {n.outer, n.middle, n.inner, n.cols});
}

// How a tensor lies in the memory that it is said to have.
void require_input(const Extents& extents, size_t tensor, const char* name, const NormInput& t, const NormShape& n) {
  if (!t.data) return;
  require_stride(name, t.outer, n.outer);
  require_stride(name, t.middle, n.middle);
  require_stride(name, t.inner, n.inner);
  extents.require_reach(tensor, name, reach({{n.outer, t.outer}, {n.middle, t.middle}, {n.inner, t.inner}}, n.cols));
}

// Units of work worth a thread each.
int64_t worthwhile(int threads, const NormShape& n) {
  return std::max<int64_t>(1, std::min<int64_t>(threads, rows_of(n) * n.cols / kElementsPerThread));
}

}  // namespace

void norm_fwd(const Norm& p, int threads, const Extents& extents) {
  const NormShape& n = p.shape;
  require_shape(p.dtype, n, threads);
  extents.require_tensors(6);
  const int64_t rows = rows_of(n);
  if (rows == 0 || n.cols == 0) return;
  require(p.x.data && p.normed, "null pointer for a tensor that has elements");
  require(!p.residual.data == !p.summed, "summed: expected with residual, and only then");
  require_input(extents, 0, "x", p.x, n);
  require_input(extents, 1, "residual", p.residual, n);
  extents.require_reach(2, "weight", p.weight ? n.cols : 0);
  extents.require_reach(3, "bias", p.bias ? n.cols : 0);
  extents.require_reach(4, "normed", rows * n.cols);
  extents.require_reach(5, "summed", p.summed ? rows * n.cols : 0);

  const Floats weight = widened(p.dtype, p.weight, p.offset, n.cols), bias = widened(p.dtype, p.bias, 0.0f, n.cols);
  const NormFwdKernel& kernel = kernels().norm_fwd_kernel;
  const int64_t step = std::max<int64_t>(1, kElementsPerUnit / n.cols), units = (rows + step - 1) / step;
  over_units(units, int(worthwhile(threads, n)), 0, [&](int64_t unit, void*) {
    kernel.run(p, weight.get(), bias.get(), unit * step, std::min(rows, (unit + 1) * step));
  });
}

void norm_bwd(const NormBwd& p, int threads, const Extents& extents) {
  const NormShape& n = p.shape;
  require_shape(p.dtype, n, threads);
  extents.require_tensors(7);
  const int64_t rows = rows_of(n), cols = n.cols;
  if (cols == 0) return;
  if (rows > 0) require(p.grad.data && p.summed.data && p.d_x, "null pointer for a tensor that has elements");
  require_input(extents, 0, "grad", p.grad, n);
  require_input(extents, 1, "grad_summed", p.grad_summed, n);
  require_input(extents, 2, "summed", p.summed, n);
  extents.require_reach(3, "weight", p.weight ? cols : 0);
  extents.require_reach(4, "d_x", rows * cols);
  extents.require_reach(5, "d_weight", p.d_weight ? cols : 0);
  extents.require_reach(6, "d_bias", p.d_bias ? cols : 0);

  const Floats weight = widened(p.dtype, p.weight, p.offset, cols);
  const NormBwdKernel& kernel = kernels().norm_bwd_kernel;
  const int64_t step = std::max(kRowsPerShare, (rows + kShares - 1) / kShares), units = (rows + step - 1) / step;
  const Floats of_weight = p.d_weight ? floats(units * cols) : nullptr, of_bias = p.d_bias ? floats(units * cols) : nullptr;
  auto share = [&](const Floats& shares, int64_t unit) { return shares ? shares.get() + unit * cols : nullptr; };
  if (rows > 0) over_units(units, int(worthwhile(threads, n)), 0, [&](int64_t unit, void*) {
    kernel.run(p, weight.get(), unit * step, std::min(rows, (unit + 1) * step), share(of_weight, unit), share(of_bias, unit));
  });
  const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(threads, units * cols / kElementsPerThread));
  over_shares(cols, wanted, [&](int64_t begin, int64_t end) {
    if (p.d_weight) kernel.sum(p.dtype, of_weight.get(), units, cols, begin, end, p.d_weight);
    if (p.d_bias) kernel.sum(p.dtype, of_bias.get(), units, cols, begin, end, p.d_bias);
  });
}

}  // namespace vlmkern
