// Linear layers: products with few rows, y = x W^T + b, limited by reading W once; and an activation that libraries of
// products do not have.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace vlmkern {

class Extents;  // cpu/check.h, which the kernels do without

inline constexpr int64_t kMaxLinearRows = 4;

// x [rows, inputs] and weight [outputs, inputs], rows of given strides (elements); bias [outputs] or null;
// y [rows, outputs] dense.
struct FewRowsLinear {
  DType dtype;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const void* bias;
  void* y;
  int64_t rows, inputs, outputs;
};

// Outputs begin to end of all rows.
struct FewRowsLinearKernel {
  void (*run)(const FewRowsLinear&, int64_t begin, int64_t end);
};

// x [count], dense, in its place.
struct QuickGeluKernel {
  void (*run)(DType, void* x, int64_t count);
};

// Extents of x, weight, bias and y. Throws std::invalid_argument on sizes and strides that cannot be; touches nothing
// before that.
void linear_few_rows(const FewRowsLinear& problem, int threads, const Extents& extents);

// Extents of x. Throws as above.
void quick_gelu(DType dtype, void* x, int64_t count, int threads, const Extents& extents);

}  // namespace vlmkern
