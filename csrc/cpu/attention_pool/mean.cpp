// The means of windows, from which attention pooling makes its queries.
#include "cpu/attention_pool/attention_pool.h"

#include "cpu/attention_pool/slots.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

template <typename T>
void mean(const PoolWindows& p, int64_t begin, int64_t end, T* out) {
  const Vec size = set1(float(p.size));
  for (int64_t window = begin; window < end; ++window)
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      T* row = out + (window * p.layers + layer) * p.channels;
      // strips of sums that stay in L1, so that each slot is looked up once per strip and read along its row
      constexpr int64_t kStrip = 64 * kWidth;
      float sums[kStrip];
      for (int64_t strip = 0; strip < p.channels; strip += kStrip) {
        const int64_t count = least(p.channels - strip, kStrip);
        for (int64_t j = 0; j < p.size; ++j) {
          const Slot<T> slot = slot_at<T>(p, window, j, layer, strip);
          for (int64_t c = 0; c < count; c += kWidth) {
            const Vec x = slot_values(slot, c, count - c);
            store(sums + c, j == 0 ? x : load(sums + c) + x);
          }
        }
        for (int64_t c = 0; c < count; c += kWidth) store_n(row + strip + c, load(sums + c) / size, int(least(count - c, kWidth)));
      }
    }
}

void run(const PoolWindows& p, int64_t begin, int64_t end, void* out) {
  switch (p.dtype) {
    case DType::f32: return mean(p, begin, end, static_cast<float*>(out));
    case DType::bf16: return mean(p, begin, end, static_cast<bf16*>(out));
    case DType::f16: return mean(p, begin, end, static_cast<f16*>(out));
  }
}

}  // namespace

extern const PoolMeanKernel pool_mean_kernel{run};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
