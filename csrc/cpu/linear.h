// Matrix products with few rows: y = x W^T + b, limited by reading W once.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace vlmkern {

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

// Throws std::invalid_argument on sizes and strides that cannot be; touches nothing before that.
void linear_few_rows(const FewRowsLinear& problem, int threads);

}  // namespace vlmkern
