// Attention pooling with one head, whose query comes projected into the slots' space: scores and pooled slots are products of
// vectors, channels in the lanes. Per window: 4 * channels * slots FLOPs, and each slot is read twice.
//
// There is no form for AMX: one row of 16 and a window's columns are a sixteenth of a tile. 4 windows of 4 slots by 2304 channels are
// 72 products of 16 cycles, as many as vectors take to multiply, and the slots would have to be transposed first, 80 cycles for each
// product. Memory, at 16 GB/s, gives these slots in 4.6 us, 16,000 cycles.
#include "cpu/attention_pool/attention_pool.h"

#include "cpu/attention_pool/slots.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

inline float sum_of(Vec a) {
  float lanes[kWidth], sum = 0;
  store(lanes, a);
  for (float x : lanes) sum += x;
  return sum;
}

// One head: channels in the lanes, `s` has room for a vector per slot.
template <typename T>
void pool_slots(const PoolWindows& p, const T* q, int64_t begin, int64_t end, float scale, float* s, T* out) {
  const int64_t width = p.layers * p.channels;
  const SignedScale parts(scale);
  const Vec before = set1(parts.before), after = set1(parts.after * kLog2e);
  for (int64_t window = begin; window < end; ++window) {
    memset(s, 0, p.size * kWidth * sizeof(float));
    for (int64_t layer = 0; layer < p.layers; ++layer)
      for (int64_t j = 0; j < p.size; ++j) {
        const Slot<T> slot = slot_at<T>(p, window, j, layer, 0);
        const T* with = q + window * width + layer * p.channels;
        Vec sums[2] = {set1(0.0f), set1(0.0f)};
        for (int64_t c = 0; c < p.channels; c += 2 * kWidth)
          for (int half = 0; half < 2; ++half) {
            const int64_t at = c + half * kWidth, n = least(p.channels - at, kWidth);
            if (n > 0) sums[half] = fma(load_n(with + at, int(n)), slot_values(slot, at, n), sums[half]);
          }
        store(s + j * kWidth, load(s + j * kWidth) + (sums[0] + sums[1]));
      }
    Vec highest = set1(-kInfinity), sum = set1(0.0f);
    for (int64_t j = 0; j < p.size; ++j) {
      const Vec x = set1(sum_of(load(s + j * kWidth))) * before;
      highest = max(highest, x);
      store(s + j * kWidth, x);
    }
    for (int64_t j = 0; j < p.size; ++j) {
      const Vec x = exp2_nonpositive<6>((load(s + j * kWidth) - highest) * after);
      sum = sum + x;
      store(s + j * kWidth, x);
    }
    for (int64_t j = 0; j < p.size; ++j) store(s + j * kWidth, load(s + j * kWidth) / sum);
    for (int64_t layer = 0; layer < p.layers; ++layer)
      for (int64_t c = 0; c < p.channels; c += kWidth) {
        const int64_t n = least(p.channels - c, kWidth);
        Vec y = set1(0.0f);
        for (int64_t j = 0; j < p.size; ++j)
          y = fma(load(s + j * kWidth), slot_values(slot_at<T>(p, window, j, layer, 0), c, n), y);
        store_n(out + window * width + layer * p.channels + c, y, int(n));
      }
  }
}

void run(const PoolWindows& p, const void* q, int64_t begin, int64_t end, float scale, void* scratch, void* out) {
  float* s = static_cast<float*>(scratch);
  switch (p.dtype) {
    case DType::f32: return pool_slots(p, static_cast<const float*>(q), begin, end, scale, s, static_cast<float*>(out));
    case DType::bf16: return pool_slots(p, static_cast<const bf16*>(q), begin, end, scale, s, static_cast<bf16*>(out));
    case DType::f16: return pool_slots(p, static_cast<const f16*>(q), begin, end, scale, s, static_cast<f16*>(out));
  }
}

}  // namespace

extern const PoolSlotsKernel pool_slots_kernel{kWidth, run};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
