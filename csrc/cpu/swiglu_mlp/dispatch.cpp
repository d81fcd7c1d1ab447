#include "cpu/swiglu_mlp/swiglu_mlp.h"

#include <algorithm>

#include "cpu/check.h"
#include "cpu/kernels.h"
#include "cpu/units.h"

namespace vlmkern {
namespace {

// Whether there is anything to compute.
bool check(DType dtype, int64_t rows, int64_t cols, int64_t up_stride, int threads, bool pointers) {
  require_dtype(dtype);
  require_threads(threads);
  require_product("rows and cols", {rows, cols, 2});
  if (rows == 0 || cols == 0) return false;
  require_stride("up_stride", up_stride, rows);
  if (rows > 1 && up_stride < 2 * cols)
    throw std::invalid_argument("up_stride: got " + std::to_string(up_stride) + ", expected at least 2*cols = " + std::to_string(2 * cols));
  require(pointers, "null pointer for a tensor that has elements");
  return true;
}

// Calls body(begin, end) on rows, one share per thread. The split never changes a result: every element is computed by
// itself.
template <typename Body>
void over_rows(int64_t rows, int64_t cols, int threads, Body body) {
  // below this many elements waking a second thread costs more than it saves
  constexpr int64_t kElementsPerThread = 1 << 15;
  over_shares(rows, std::min<int64_t>(threads, rows * cols / kElementsPerThread), body);
}

}  // namespace

void silu_mul_fwd(DType dtype, const void* up, int64_t up_stride, void* out, int64_t rows, int64_t cols, int threads, const Extents& extents) {
  extents.require_tensors(2);
  if (!check(dtype, rows, cols, up_stride, threads, up && out)) return;
  extents.require_reach(0, "up", reach({{rows, up_stride}}, 2 * cols));
  extents.require_reach(1, "out", rows * cols);
  if (rows == 1) up_stride = 0;
  const int64_t size = element_size(dtype);
  const SiluMulKernel& kernel = kernels().silu_mul_kernel;
  over_rows(rows, cols, threads, [&](int64_t begin, int64_t end) {
    kernel.fwd(dtype, static_cast<const char*>(up) + begin * up_stride * size, up_stride, static_cast<char*>(out) + begin * cols * size,
                   end - begin, cols);
  });
}

void silu_mul_bwd(DType dtype, const void* grad, const void* up, int64_t up_stride, void* grad_up, void* hidden, int64_t rows, int64_t cols,
                  int threads, const Extents& extents) {
  extents.require_tensors(4);
  if (!check(dtype, rows, cols, up_stride, threads, grad && up && grad_up && hidden)) return;
  extents.require_reach(0, "grad", rows * cols);
  extents.require_reach(1, "up", reach({{rows, up_stride}}, 2 * cols));
  extents.require_reach(2, "grad_up", rows * 2 * cols);
  extents.require_reach(3, "hidden", rows * cols);
  if (rows == 1) up_stride = 0;
  const int64_t size = element_size(dtype);
  const SiluMulKernel& kernel = kernels().silu_mul_kernel;
  over_rows(rows, cols, threads, [&](int64_t begin, int64_t end) {
    kernel.bwd(dtype, static_cast<const char*>(grad) + begin * cols * size, static_cast<const char*>(up) + begin * up_stride * size,
                   up_stride, static_cast<char*>(grad_up) + begin * 2 * cols * size, static_cast<char*>(hidden) + begin * cols * size,
                   end - begin, cols);
  });
}

}  // namespace vlmkern
