#include <omp.h>

#include <algorithm>

#include "cpu/check.h"
#include "cpu/kernels.h"

namespace vlmkern {

void linear_few_rows(const FewRowsLinear& p, int threads) {
  require(known(p.dtype), "dtype: unknown code");
  require(p.rows >= 0 && p.rows <= kMaxLinearRows, "rows: expected 0 to 4");
  require(p.inputs >= 0 && p.inputs <= kLimit && p.outputs >= 0 && p.outputs <= kLimit, "inputs, outputs: out of range");
  require(p.rows <= 1 || (p.x_stride >= 0 && p.x_stride <= kLimit), "x_stride: out of range");
  require(p.outputs <= 1 || (p.weight_stride >= 0 && p.weight_stride <= kLimit / p.outputs), "weight_stride: out of range");
  if (p.rows == 0 || p.outputs == 0) return;
  require(p.y && (p.inputs == 0 || (p.x && p.weight)), "null pointer for a tensor that has elements");

  const Kernels& k = kernels();
  // below this many weights waking a second thread costs more than it saves
  constexpr int64_t kWeightsPerThread = 1 << 16;
  const int64_t wanted = std::clamp<int64_t>(p.outputs * std::max<int64_t>(p.inputs, 1) / kWeightsPerThread, 1, std::max(threads, 1));
  if (wanted == 1) return k.linear_few_rows(p, 0, p.outputs);
#pragma omp parallel num_threads(int(wanted))
  {
    const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
    k.linear_few_rows(p, p.outputs * i / n, p.outputs * (i + 1) / n);
  }
}

}  // namespace vlmkern
