#include <algorithm>

#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/units.h"

namespace vlmkern {

void linear_few_rows(const FewRowsLinear& problem, int threads, const Extents& extents) {
  FewRowsLinear p = problem;
  require_dtype(p.dtype);
  require_threads(threads);
  if (p.rows < 0 || p.rows > kMaxLinearRows)
    throw std::invalid_argument("rows: got " + std::to_string(p.rows) + ", expected 0 to " + std::to_string(kMaxLinearRows));
  require_product("weight", {p.outputs, p.inputs});
  require_product("x", {p.rows, p.inputs});
  require_product("y", {p.rows, p.outputs});
  require_stride("x_stride", p.x_stride, p.rows);
  require_stride("weight_stride", p.weight_stride, p.outputs);
  extents.require_tensors(4);
  if (p.rows == 0 || p.outputs == 0) return;
  require(p.y && (p.inputs == 0 || (p.x && p.weight)), "null pointer for a tensor that has elements");
  extents.require_reach(0, "x", reach({{p.rows, p.x_stride}}, p.inputs));
  extents.require_reach(1, "weight", reach({{p.outputs, p.weight_stride}}, p.inputs));
  extents.require_reach(2, "bias", p.bias ? p.outputs : 0);
  extents.require_reach(3, "y", p.rows * p.outputs);
  // the kernel steps over a last row too
  if (p.outputs == 1) p.weight_stride = 0;

  const FewRowsLinearKernel& kernel = kernels().few_rows_linear_kernel;
  // below this many weights waking a second thread costs more than it saves
  constexpr int64_t kWeightsPerThread = 1 << 16;
  const int64_t wanted = std::min<int64_t>(p.outputs * std::max<int64_t>(p.inputs, 1) / kWeightsPerThread, threads);
  over_shares(p.outputs, wanted, [&](int64_t begin, int64_t end) { kernel.run(p, begin, end); });
}

void quick_gelu(DType dtype, void* x, int64_t count, int threads, const Extents& extents) {
  require_dtype(dtype);
  require_threads(threads);
  require_product("count", {count});
  extents.require_tensors(1);
  if (count == 0) return;
  require(x, "null pointer for a tensor that has elements");
  extents.require_reach(0, "x", count);
  const QuickGeluKernel& kernel = kernels().quick_gelu_kernel;
  // below this many elements waking a second thread costs more than it saves
  constexpr int64_t kElementsPerThread = 1 << 15;
  over_shares(count, std::min<int64_t>(threads, count / kElementsPerThread), [&](int64_t begin, int64_t end) {
    kernel.run(dtype, static_cast<char*>(x) + begin * element_size(dtype), end - begin);
  });
}

}  // namespace vlmkern
