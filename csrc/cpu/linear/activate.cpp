// quick GELU, x sigmoid(1.702 x), of a product's result in its place: oneDNN has no epilogue for it. Hendrycks and Gimpel,
// "Gaussian Error Linear Units" (2016), section 2.
//
// Traffic: each element read and written once. Arithmetic is float32.
#include "cpu/linear/linear.h"
#include "cpu/vec.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

template <typename T>
void quick_gelu(T* x, int64_t count) {
  const Vec one = set1(1.0f), steepness = set1(-1.702f);
  for (int64_t i = 0; i < count; i += Vec::width) {
    const int n = int(count - i < Vec::width ? count - i : Vec::width);
    const Vec value = load_n(x + i, n);
    store_n(x + i, value / (one + exp(steepness * value)), n);
  }
}

void run(DType dtype, void* x, int64_t count) {
  switch (dtype) {
    case DType::f32: return quick_gelu(static_cast<float*>(x), count);
    case DType::bf16: return quick_gelu(static_cast<bf16*>(x), count);
    case DType::f16: return quick_gelu(static_cast<f16*>(x), count);
  }
}

}  // namespace

extern const QuickGeluKernel quick_gelu_kernel{run};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
