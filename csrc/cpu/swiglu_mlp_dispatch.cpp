#include "cpu/swiglu_mlp.h"

#include <omp.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace vlmkern {
namespace {

void check_rows(DType dtype, int64_t rows, int64_t cols, int64_t up_stride, bool pointers) {
  if (!known(dtype)) throw std::invalid_argument("dtype: unknown code");
  if (rows < 0 || cols < 0) throw std::invalid_argument("rows and cols must not be negative");
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max() / 16;
  if (cols > kMax) throw std::invalid_argument("cols: got " + std::to_string(cols) + ", which no memory holds");
  if (up_stride < 2 * cols || (rows > 0 && up_stride > kMax / rows))
    throw std::invalid_argument("up_stride: got " + std::to_string(up_stride) + ", expected at least 2*cols = " + std::to_string(2 * cols) +
                                " and rows * up_stride addressable");
  if (rows > 0 && cols > 0 && !pointers) throw std::invalid_argument("null pointer for a tensor that has elements");
}

// Calls body(begin, end) on row ranges, one per thread. The split never changes a result: every
// element is computed by itself.
template <typename Body>
void over_rows(int64_t rows, int64_t cols, int threads, Body body) {
  // below this many elements waking a second thread costs more than it saves
  constexpr int64_t kElementsPerThread = 1 << 15;
  const int64_t wanted = std::min<int64_t>(std::max(threads, 1), rows * cols / kElementsPerThread);
  if (wanted <= 1) {
    body(0, rows);
    return;
  }
#pragma omp parallel num_threads(int(wanted))
  {
    const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
    body(rows * i / n, rows * (i + 1) / n);
  }
}

}  // namespace

void silu_mul_fwd(DType dtype, const void* up, int64_t up_stride, void* out, int64_t rows, int64_t cols, int threads) {
  check_rows(dtype, rows, cols, up_stride, up && out);
  const int64_t size = element_size(dtype);
  const Kernels& k = kernels();
  over_rows(rows, cols, threads, [&](int64_t begin, int64_t end) {
    k.silu_mul_fwd(dtype, static_cast<const char*>(up) + begin * up_stride * size, up_stride, static_cast<char*>(out) + begin * cols * size,
                   end - begin, cols);
  });
}

void silu_mul_bwd(DType dtype, const void* grad, const void* up, int64_t up_stride, void* grad_up, void* hidden, int64_t rows, int64_t cols,
                  int threads) {
  check_rows(dtype, rows, cols, up_stride, grad && up && grad_up && hidden);
  const int64_t size = element_size(dtype);
  const Kernels& k = kernels();
  over_rows(rows, cols, threads, [&](int64_t begin, int64_t end) {
    k.silu_mul_bwd(dtype, static_cast<const char*>(grad) + begin * cols * size, static_cast<const char*>(up) + begin * up_stride * size,
                   up_stride, static_cast<char*>(grad_up) + begin * 2 * cols * size, static_cast<char*>(hidden) + begin * cols * size,
                   end - begin, cols);
  });
}

}  // namespace vlmkern
