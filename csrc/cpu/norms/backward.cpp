// Gradients of layer norm and RMS norm. With n = (x - mean) * scale the normed row, mean 0 for RMS norm, and
// g = grad * weight, where means are those over the row:
//     d_x = scale * (g - mean(g) - n * mean(g * n)) + grad_summed, without mean(g) for RMS norm;
//     d_weight = sum over rows of grad * n, d_bias = sum over rows of grad.
// The statistics are computed again from the row.
//
// Traffic: grad, grad_summed, summed and d_x once, as rows are read again from the first cache. About 20 FLOPs an
// element.
#include "cpu/norms/rows.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

// rows that go through the columns together, so that sums over rows are read and written once for all of them
constexpr int kRows = 4;
// Bytes of a row from which on they do, on Zen 4: at 2,304 it makes no difference, at 4,096 and 8,192 it takes 12 to 31 %
// less time. Short rows that come from memory in turns are no streams that it could foresee: 1.8 times the time at 512.
constexpr int64_t kLongRow = 2048;

template <typename T>
struct Row {
  const T *grad, *grad_summed, *x;
  T* d_x;
  Moments moments;
  // mean(g) and mean(g * n)
  float level, along;
};

template <typename T, bool centred>
inline void measure(Row<T>& row, const float* weight, int64_t cols, float eps) {
  const int lanes = lanes_of(cols);
  float pivot = centred ? pivot_of(load_n(row.x, lanes), lanes) : 0.0f;
  for (int pass = 0; pass < 2; ++pass) {
    RowSums<centred> sums(pivot);
    Vec levels[kSums] = {}, products[kSums] = {};
    over_blocks(
        cols,
        [&](int64_t c, int n, int k) {
          Vec g = load_n(row.grad + c, n);
          if (weight) g = g * load_n(weight + c, n);
          if (centred) levels[k] = levels[k] + g;
          products[k] = fma(g, sums.add(load_n(row.x + c, n), n, k), products[k]);
        },
        [&] { sums.fold(); });
    const bool done = sums.close(cols, eps, pass == 1, row.moments);
    row.level = horizontal_sum(joined(levels)) / float(cols);
    row.along = (horizontal_sum(joined(products)) / float(cols) - (row.moments.mean - pivot) * row.level) * row.moments.scale;
    if (done) return;
    pivot = row.moments.mean;
  }
}

template <typename T, bool centred, int rows>
inline void differentiate(const Row<T> (&row)[kRows], const float* weight, int64_t cols, float* d_weight, float* d_bias) {
  over_columns(0, cols, [&](int64_t c, int n, int) {
    const Vec w = weight ? load_n(weight + c, n) : set1(1.0f);
    Vec of_weight = d_weight ? load_n(d_weight + c, n) : set1(0.0f), of_bias = d_bias ? load_n(d_bias + c, n) : set1(0.0f);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Row<T>& at = row[r];
      const Vec grad = load_n(at.grad + c, n);
      Vec normed = load_n(at.x + c, n);
      if (centred) normed = normed - set1(at.moments.mean);
      normed = normed * set1(at.moments.scale);
      Vec d_x = grad * w;
      if (centred) d_x = d_x - set1(at.level);
      d_x = (d_x - normed * set1(at.along)) * set1(at.moments.scale);
      if (at.grad_summed) d_x = d_x + load_n(at.grad_summed + c, n);
      store_n(at.d_x + c, d_x, n);
      of_weight = fma(grad, normed, of_weight);
      of_bias = of_bias + grad;
    }
    if (d_weight) store_n(d_weight + c, of_weight, n);
    if (d_bias) store_n(d_bias + c, of_bias, n);
  });
}

template <typename T, bool centred>
void norm_bwd(const NormBwd& p, const float* weight, int64_t begin, int64_t end, float* d_weight, float* d_bias) {
  const int64_t cols = p.shape.cols;
  if (d_weight) memset(d_weight, 0, cols * sizeof(float));
  if (d_bias) memset(d_bias, 0, cols * sizeof(float));
  Cursor at(p.shape, begin);
  Row<T> rows[kRows];
  const int together = cols * int64_t(sizeof(T)) >= kLongRow ? kRows : 1;
  for (int64_t first = begin; first < end; first += together) {
    const int count = int(end - first < together ? end - first : together);
    for (int r = 0; r < count; ++r, at.next()) {
      rows[r].grad = at.of<T>(p.grad), rows[r].x = at.of<T>(p.summed);
      rows[r].grad_summed = p.grad_summed.data ? at.of<T>(p.grad_summed) : nullptr;
      rows[r].d_x = static_cast<T*>(p.d_x) + (first + r) * cols;
      measure<T, centred>(rows[r], weight, cols, p.eps);
    }
    switch (count) {
      case 1: differentiate<T, centred, 1>(rows, weight, cols, d_weight, d_bias); break;
      case 2: differentiate<T, centred, 2>(rows, weight, cols, d_weight, d_bias); break;
      case 3: differentiate<T, centred, 3>(rows, weight, cols, d_weight, d_bias); break;
      case 4: differentiate<T, centred, 4>(rows, weight, cols, d_weight, d_bias); break;
    }
  }
}

template <typename T>
void norm_bwd(const NormBwd& p, const float* weight, int64_t begin, int64_t end, float* d_weight, float* d_bias) {
  return p.centred ? norm_bwd<T, true>(p, weight, begin, end, d_weight, d_bias)
                   : norm_bwd<T, false>(p, weight, begin, end, d_weight, d_bias);
}

void run(const NormBwd& p, const float* weight, int64_t begin, int64_t end, float* d_weight, float* d_bias) {
  switch (p.dtype) {
    case DType::f32: return norm_bwd<float>(p, weight, begin, end, d_weight, d_bias);
    case DType::bf16: return norm_bwd<bf16>(p, weight, begin, end, d_weight, d_bias);
    case DType::f16: return norm_bwd<f16>(p, weight, begin, end, d_weight, d_bias);
  }
}

template <typename T>
void sum(const float* shares, int64_t count, int64_t cols, int64_t begin, int64_t end, T* to) {
  over_columns(begin, end, [&](int64_t c, int n, int) {
    Vec all = set1(0.0f);
    for (int64_t i = 0; i < count; ++i) all = all + load_n(shares + i * cols + c, n);
    store_n(to + c, all, n);
  });
}

void run_sum(DType dtype, const float* shares, int64_t count, int64_t cols, int64_t begin, int64_t end, void* to) {
  switch (dtype) {
    case DType::f32: return sum(shares, count, cols, begin, end, static_cast<float*>(to));
    case DType::bf16: return sum(shares, count, cols, begin, end, static_cast<bf16*>(to));
    case DType::f16: return sum(shares, count, cols, begin, end, static_cast<f16*>(to));
  }
}

}  // namespace

extern const NormBwdKernel norm_bwd_kernel{run, run_sum};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
