// Gradients of attention pooling, between the products with weights, by the algebra of heads.h: neither keys
// nor values of single slots are made, nor their gradients. Per window with slots x_j and per head:
//     a = W_K^T q and b = W_V^T do come in, from the query and the gradient of the head's attended values;
//     p = softmax_j(scale * a . x_j), ds_j = scale * p_j (b . x_j - sum_i p_i b . x_i), as biases drop out of both;
//     dx_j += ds_j a + p_j b;
//     y = sum_j ds_j x_j and pooled = sum_j p_j x_j take the places of a and b. The rest is theirs:
//     dq = W_K y, dW_K = q y^T, dW_V = do pooled^T.
//
// 16 * slots FLOPs and about four elements of traffic per head and channel; sums are float32. bfloat16 with AMX has the products
// with x by tiles, see tile_gradients.h.
#include "cpu/attention_pool/attention_pool.h"
#include "cpu/attention_pool/tile_gradients.h"
#include "cpu/tile.h"

namespace vlmkern {
namespace VLMKERN_ISA {
namespace {

constexpr int kSlots = 4;  // slots that share a pass over a and b

int lanes_from(int64_t width, int64_t c) { return int(width - c < Vec::width ? width - c : Vec::width); }

// to[j] = vector . x_j
template <typename T>
void dots(const T* vector, const T* x, int64_t size, int64_t width, float* to) {
  for (int64_t j = 0; j < size; j += kSlots) {
    const int rows = int(size - j < kSlots ? size - j : kSlots);
    const T* row[kSlots];
    for (int r = 0; r < kSlots; ++r) row[r] = x + (j + (r < rows ? r : rows - 1)) * width;
    Vec sum[kSlots] = {};
    for (int64_t c = 0; c < width; c += Vec::width) {
      const int n = lanes_from(width, c);
      const Vec v = load_n(vector + c, n);
      for (int r = 0; r < kSlots; ++r) sum[r] = fma(v, load_n(row[r] + c, n), sum[r]);
    }
    for (int r = 0; r < rows; ++r) to[j + r] = horizontal_sum(sum[r]);
  }
}

// scores -> p, a . x_j to ds
void weigh(float* p, float* ds, int64_t size, float scale) {
  const SignedScale parts(scale);
  float highest = p[0] * parts.before, total = 0, mean = 0;
  for (int64_t j = 0; j < size; ++j) {
    p[j] *= parts.before;
    if (p[j] > highest) highest = p[j];
  }
  for (int64_t j = 0; j < size; ++j) total += p[j] = __builtin_expf((p[j] - highest) * parts.after);
  for (int64_t j = 0; j < size; ++j) p[j] /= total;
  for (int64_t j = 0; j < size; ++j) mean += p[j] * ds[j];
  for (int64_t j = 0; j < size; ++j) ds[j] = p[j] * (ds[j] - mean) * scale;
}

// dx of a window; called out of line, the whole takes 5 % longer in bfloat16 (4 heads, Zen 4)
template <typename T>
inline __attribute__((always_inline)) void add_dx(const PoolSlotsBwd& task, int64_t window, const float* p, const float* ds) {
  const int64_t size = task.size, width = task.width, heads = task.heads;
  auto vector = [&](int64_t i) { return static_cast<const T*>(task.vectors[i]) + window * width; };
  float* dx = task.dx + window * size * width;
  for (int64_t j = 0; j < size; j += kSlots) {
    const int rows = int(size - j < kSlots ? size - j : kSlots);
    for (int64_t c = 0; c < width; c += Vec::width) {
      const int n = lanes_from(width, c);
      Vec sum[kSlots] = {};
      for (int64_t h = 0; h < heads; ++h) {
        const Vec a = load_n(vector(2 * h) + c, n), b = load_n(vector(2 * h + 1) + c, n);
        for (int r = 0; r < kSlots; ++r) {
          const int64_t at = h * size + j + (r < rows ? r : 0);
          sum[r] = fma(set1(ds[at]), a, fma(set1(p[at]), b, sum[r]));
        }
      }
      for (int r = 0; r < rows; ++r) {
        float* to = dx + (j + r) * width + c;
        store_n(to, load_n(to, n) + sum[r], n);
      }
    }
  }
}

// The products by vectors, a window at a time.
template <typename T>
struct VectorGradients {
  using Registers = NoRegisters;
  static constexpr int64_t panel = 1;

  const PoolSlotsBwd& task;
  float *p, *ds;

  VectorGradients(const PoolSlotsBwd& task, float* memory) : task(task), p(memory), ds(memory + task.heads * task.size) {}
  static int64_t words(const PoolSlotsBwd& task) { return 2 * task.heads * task.size; }

  const T* x_of(int64_t window) const { return static_cast<const T*>(task.x) + window * task.size * task.width; }
  T* vector(int64_t window, int64_t i) const { return static_cast<T*>(task.vectors[i]) + window * task.width; }

  void score(int64_t window, int64_t) const {
    const T* x = x_of(window);
    for (int64_t h = 0; h < task.heads; ++h) {
      dots(vector(window, 2 * h), x, task.size, task.width, p + h * task.size);
      dots(vector(window, 2 * h + 1), x, task.size, task.width, ds + h * task.size);
    }
  }
  void pool(int64_t window, int64_t) const {
    const int64_t size = task.size, width = task.width, heads = task.heads;
    const float *by_p = p, *by_ds = ds;  // members would be read again after each store
    const T* x = x_of(window);
    for (int64_t h = 0; h < heads; ++h) {
      T *y = vector(window, 2 * h), *pooled = vector(window, 2 * h + 1);
      for (int64_t c = 0; c < width; c += Vec::width) {
        const int n = lanes_from(width, c);
        Vec sum = set1(0.0f), total = set1(0.0f);
        for (int64_t j = 0; j < size; ++j) {
          const Vec slot = load_n(x + j * width + c, n);
          sum = fma(set1(by_ds[h * size + j]), slot, sum);
          total = fma(set1(by_p[h * size + j]), slot, total);
        }
        store_n(y + c, sum, n);
        store_n(pooled + c, total, n);
      }
    }
  }
};

// `Products` multiply in scratch, for up to `panel` windows at a time; p and ds are theirs, [window][head][slot]:
//     words(task)            32-bit words of scratch
//     Registers              what a thread must hold while it multiplies
//     score(first, count)    a . x to p, b . x to ds
//     pool(first, count)     y and pooled in the places of a and b
template <class Products, typename T>
void differentiate(const PoolSlotsBwd& task, int64_t begin, int64_t end, void* memory) {
  const Products products(task, static_cast<float*>(memory));
  const typename Products::Registers registers;
  const int64_t size = task.size, weights = task.heads * size;
  for (int64_t first = begin; first < end; first += products.panel) {
    const int64_t count = end - first < products.panel ? end - first : products.panel;
    products.score(first, count);
    for (int64_t at = 0; at < count * weights; at += size) weigh(products.p + at, products.ds + at, size, task.scale);
    for (int64_t i = 0; i < count; ++i) add_dx<T>(task, first + i, products.p + i * weights, products.ds + i * weights);
    products.pool(first, count);
  }
}

#if VLMKERN_TILES
// one head takes longer by tiles, see tile_gradients.h
bool by_tiles(const PoolSlotsBwd& task) { return task.dtype == DType::bf16 && task.heads > 1; }
#endif

size_t scratch_bytes(const PoolSlotsBwd& task) {
#if VLMKERN_TILES
  if (by_tiles(task)) return TileGradients::words(task) * sizeof(float);
#endif
  return VectorGradients<float>::words(task) * sizeof(float);
}

void run(const PoolSlotsBwd& task, int64_t begin, int64_t end, void* scratch) {
#if VLMKERN_TILES
  if (by_tiles(task)) return differentiate<TileGradients, bf16>(task, begin, end, scratch);
#endif
  switch (task.dtype) {
    case DType::f32: return differentiate<VectorGradients<float>, float>(task, begin, end, scratch);
    case DType::bf16: return differentiate<VectorGradients<bf16>, bf16>(task, begin, end, scratch);
    case DType::f16: return differentiate<VectorGradients<f16>, f16>(task, begin, end, scratch);
  }
}

}  // namespace

extern const PoolSlotsBwdKernel pool_slots_bwd_kernel{scratch_bytes, run};

}  // namespace VLMKERN_ISA
}  // namespace vlmkern
