// The one table between Python and C++: raw pointers as integers, sizes and strides in elements.
// Nothing of torch; the callers in vlmkern/ops own the tensors and keep them alive for the call. With `extents`, the
// elements from each address on, every call makes sure that it stays inside them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/attention/attention.h"
#include "cpu/attention_pool/attention_pool.h"
#include "cpu/check.h"
#include "cpu/isa.h"
#include "cpu/linear/linear.h"
#include "cpu/norms/norms.h"
#include "cpu/swiglu_mlp/swiglu_mlp.h"
#include "cpu/units.h"
#if VLMKERN_HAVE_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace vlmkern;

namespace {

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

using Strides = std::array<int64_t, 3>;

AttentionInputs::Strides strides(const Strides& s) { return {s[0], s[1], s[2]}; }

// The inputs of attention as Python tells them.
using HeadsTensor = std::pair<uintptr_t, Strides>;                     // [batch, token, head, head_dim], strides but for the last
using AttentionSizes = std::array<int64_t, 6>;                         // batch, queries, keys, heads, heads of keys, head_dim
using AttentionBounds = std::tuple<uintptr_t, uintptr_t, int64_t>;     // cu_seqlens, cu_seqlens_k, segments
using AttentionScoring = std::tuple<float, float, int64_t, int64_t>;   // scale, softcap, window
using AttentionTable = std::tuple<uintptr_t, int64_t, int64_t>;        // address, strides of images and tokens
using AttentionTables = std::pair<std::vector<AttentionTable>, bool>;  // cos and sin of queries, then of keys, or none; interleaved

void describe(AttentionInputs& p, int dtype, const HeadsTensor& q, const HeadsTensor& k, const HeadsTensor& v, const AttentionSizes& sizes,
              const AttentionBounds& bounds, const AttentionScoring& scoring, const AttentionTables& tables) {
  p.dtype = static_cast<DType>(dtype);
  p.q = at(q.first), p.k = at(k.first), p.v = at(v.first);
  p.q_strides = strides(q.second), p.k_strides = strides(k.second), p.v_strides = strides(v.second);
  p.batch = sizes[0], p.queries = sizes[1], p.keys = sizes[2], p.heads = sizes[3], p.kv_heads = sizes[4], p.head_dim = sizes[5];
  p.cu_seqlens = static_cast<const int32_t*>(at(std::get<0>(bounds)));
  p.cu_seqlens_k = static_cast<const int32_t*>(at(std::get<1>(bounds))), p.segments = std::get<2>(bounds);
  p.scores = {std::get<0>(scoring), std::get<1>(scoring), std::get<2>(scoring), std::get<3>(scoring)};
  const auto& [rows, interleaved] = tables;
  require(rows.empty() || rows.size() == 4, "rotary: expected four tables or none");
  const auto table = [&, &list = rows](size_t i) -> AttentionInputs::Table {
    if (list.empty()) return {nullptr, 0, 0};
    return {static_cast<const float*>(at(std::get<0>(list[i]))), std::get<1>(list[i]), std::get<2>(list[i])};
  };
  p.cos = table(0), p.sin = table(1), p.cos_k = table(2), p.sin_k = table(3);
  p.interleaved = interleaved;
}

// a tensor of rows that are counted through three sizes: its address, and its strides over them
using Rows = std::pair<uintptr_t, Strides>;

NormInput rows(const Rows& r) { return {at(r.first), r.second[0], r.second[1], r.second[2]}; }

// tables of cosines and sines, each an address and its tokens' stride; tokens, heads; interleaved
using RotationTables = std::tuple<std::pair<uintptr_t, int64_t>, std::pair<uintptr_t, int64_t>, int64_t, int64_t, bool>;

NormRotation rotation(const RotationTables& r) {
  const auto& [cos, sin, tokens, heads, interleaved] = r;
  const auto table = [](uintptr_t address) { return static_cast<const float*>(at(address)); };
  return {table(cos.first), table(sin.first), cos.second, sin.second, tokens, heads, interleaved};
}

NormShape shape(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

using ExtentList = std::vector<int64_t>;

// The windows of attention_pool, with what a problem's features point to.
class PoolProblem {
 public:
  using Feature = std::tuple<uintptr_t, int64_t, int64_t>;  // address, strides of tiles and patches

  PoolProblem(int dtype, const std::vector<Feature>& features, int64_t tiles, int64_t channels, std::array<int64_t, 2> grid,
              std::array<int64_t, 2> window, uintptr_t pad, uintptr_t pad_embed, uintptr_t keep, int64_t windows, ExtentList extents)
      : extents_(std::move(extents)) {
    for (const auto& [address, tile_stride, patch_stride] : features) features_.push_back({at(address), tile_stride, patch_stride});
    p_.dtype = static_cast<DType>(dtype);
    p_.features = features_.data(), p_.layers = int64_t(features_.size());
    p_.tiles = tiles, p_.channels = channels;
    p_.grid_rows = grid[0], p_.grid_cols = grid[1], p_.window_rows = window[0], p_.window_cols = window[1];
    p_.pad = static_cast<const uint8_t*>(at(pad)), p_.pad_embed = at(pad_embed);
    p_.keep = static_cast<const int64_t*>(at(keep)), p_.windows = windows;
    p_.extents = &extents_;
  }
  PoolProblem(const PoolProblem&) = delete;
  const AttentionPool& get() const { return p_; }

 private:
  std::vector<PoolFeature> features_;
  Extents extents_;
  AttentionPool p_;
};

std::vector<std::string> isas(bool for_tests) {
  std::vector<std::string> names;
  for (Isa isa : kAllIsas)
    if (usable(isa) && emulated(isa) == for_tests) names.push_back(name(isa));
  return names;
}

py::dict cuda() {
  py::dict d;
#if VLMKERN_HAVE_CUDA
  const CudaReport report = cuda_report();
  d["compiled"] = true;
  d["runtime_version"] = report.runtime_version;
  d["driver_version"] = report.driver_version;
  d["devices"] = report.devices;
  d["error"] = report.error;
#else
  d["compiled"] = false;
#endif
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of vlmkern";
  if (!watch_forks()) throw std::bad_alloc();
  const auto kExtents = py::arg("extents") = ExtentList();

  m.def("isa", [] { return name(active()); }, "The instruction set in use");
  m.def("usable_isas", [] { return isas(false); }, "Instruction sets that this build and CPU can run, lowest first");
  m.def("emulated_isas", [] { return isas(true); }, "What VLMKERN_CPU_ISA may name beside them, to test kernels on CPUs without them");
  m.def("cpu_vendor", cpu_vendor, "As CPUID spells it; empty where there is none");
  m.def("cpu_features", cpu_features, "Features of this CPU that kernels here or libraries beside them ask for");
  m.def("cuda", cuda, "What the CUDA half was built for and sees");

  m.def(
      "attention_fwd",
      [](int dtype, const HeadsTensor& q, const HeadsTensor& k, const HeadsTensor& v, uintptr_t out, uintptr_t lse,
         const AttentionSizes& sizes, const AttentionBounds& bounds, const AttentionScoring& scoring, const AttentionTables& tables,
         int threads, ExtentList extents) {
        py::gil_scoped_release release;
        Attention p;
        describe(p, dtype, q, k, v, sizes, bounds, scoring, tables);
        p.out = at(out), p.lse = static_cast<float*>(at(lse));
        attention_fwd(p, threads, Extents(std::move(extents)));
      },
      py::arg("dtype"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("sizes"), py::arg("bounds"),
      py::arg("scoring"), py::arg("tables"), py::arg("threads"), kExtents);
  m.def(
      "attention_bwd",
      [](int dtype, const HeadsTensor& grad, const HeadsTensor& q, const HeadsTensor& k, const HeadsTensor& v, const HeadsTensor& out,
         uintptr_t lse, uintptr_t dq, uintptr_t dk, uintptr_t dv, const AttentionSizes& sizes, const AttentionBounds& bounds,
         const AttentionScoring& scoring, const AttentionTables& tables, int threads, ExtentList extents) {
        py::gil_scoped_release release;
        AttentionBwd p;
        describe(p, dtype, q, k, v, sizes, bounds, scoring, tables);
        p.grad = at(grad.first), p.out = at(out.first);
        p.grad_strides = strides(grad.second), p.out_strides = strides(out.second);
        p.lse = static_cast<const float*>(at(lse));
        p.dq = at(dq), p.dk = at(dk), p.dv = at(dv);
        attention_bwd(p, threads, Extents(std::move(extents)));
      },
      py::arg("dtype"), py::arg("grad"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("dq"),
      py::arg("dk"), py::arg("dv"), py::arg("sizes"), py::arg("bounds"), py::arg("scoring"), py::arg("tables"), py::arg("threads"), kExtents);
  py::class_<PoolProblem>(m, "AttentionPool", py::module_local(),
                          "Addresses and sizes only: the caller keeps the tensors alive")
      .def(py::init<int, const std::vector<PoolProblem::Feature>&, int64_t, int64_t, std::array<int64_t, 2>, std::array<int64_t, 2>, uintptr_t,
                    uintptr_t, uintptr_t, int64_t, ExtentList>(),
           py::arg("dtype"), py::arg("features"), py::arg("tiles"), py::arg("channels"), py::arg("grid"), py::arg("window"), py::arg("pad"),
           py::arg("pad_embed"), py::arg("keep"), py::arg("windows"), kExtents)
      .def(
          "mean",
          [](const PoolProblem& p, uintptr_t mean, int threads, ExtentList extents) {
            py::gil_scoped_release release;
            attention_pool_mean(p.get(), at(mean), threads, Extents(std::move(extents)));
          },
          py::arg("mean"), py::arg("threads"), kExtents)
      .def(
          "context",
          [](const PoolProblem& p, uintptr_t q, uintptr_t w_k, uintptr_t w_v, uintptr_t b_v, uintptr_t context, int64_t heads,
             int64_t key_dim, int64_t value_dim, float scale, int threads, ExtentList extents) {
            py::gil_scoped_release release;
            attention_pool_context(p.get(), at(q), at(w_k), at(w_v), at(b_v), at(context), heads, key_dim, value_dim, scale, threads,
                                   Extents(std::move(extents)));
          },
          py::arg("q"), py::arg("w_k"), py::arg("w_v"), py::arg("b_v"), py::arg("context"), py::arg("heads"), py::arg("key_dim"),
          py::arg("value_dim"), py::arg("scale"), py::arg("threads"), kExtents)
      .def(
          "slots",
          [](const PoolProblem& p, uintptr_t q, uintptr_t pooled, float scale, int threads, ExtentList extents) {
            py::gil_scoped_release release;
            attention_pool_slots(p.get(), at(q), at(pooled), scale, threads, Extents(std::move(extents)));
          },
          py::arg("q"), py::arg("pooled"), py::arg("scale"), py::arg("threads"), kExtents);
  m.def(
      "attention_pool_slots_bwd",
      [](int dtype, uintptr_t x, const std::vector<std::array<uintptr_t, 2>>& vectors, uintptr_t dx, int64_t windows, int64_t size,
         int64_t width, float scale, int threads, ExtentList extents) {
        py::gil_scoped_release release;
        std::vector<void*> pointers;
        for (const auto& [a, b] : vectors) pointers.insert(pointers.end(), {at(a), at(b)});
        attention_pool_slots_bwd({static_cast<DType>(dtype), at(x), pointers.data(), static_cast<float*>(at(dx)), windows,
                                  int64_t(vectors.size()), size, width, scale},
                                 threads, Extents(std::move(extents)));
      },
      py::arg("dtype"), py::arg("x"), py::arg("vectors"), py::arg("dx"), py::arg("windows"), py::arg("size"), py::arg("width"),
      py::arg("scale"), py::arg("threads"), kExtents);
  m.attr("max_linear_rows") = kMaxLinearRows;
  m.def(
      "linear_few_rows",
      [](int dtype, uintptr_t x, int64_t x_stride, uintptr_t weight, int64_t weight_stride, uintptr_t bias, uintptr_t y, int64_t rows,
         int64_t inputs, int64_t outputs, int threads, ExtentList extents) {
        py::gil_scoped_release release;
        linear_few_rows({static_cast<DType>(dtype), at(x), x_stride, at(weight), weight_stride, at(bias), at(y), rows, inputs, outputs},
                        threads, Extents(std::move(extents)));
      },
      py::arg("dtype"), py::arg("x"), py::arg("x_stride"), py::arg("weight"), py::arg("weight_stride"), py::arg("bias"), py::arg("y"),
      py::arg("rows"), py::arg("inputs"), py::arg("outputs"), py::arg("threads"), kExtents);
  m.def(
      "quick_gelu",
      [](int dtype, uintptr_t x, int64_t count, int threads, ExtentList extents) {
        py::gil_scoped_release release;
        quick_gelu(static_cast<DType>(dtype), at(x), count, threads, Extents(std::move(extents)));
      },
      py::arg("dtype"), py::arg("x"), py::arg("count"), py::arg("threads"), kExtents);
  m.def(
      "norm_fwd",
      [](int dtype, bool centred, std::array<int64_t, 4> sizes, Rows x, Rows residual, uintptr_t weight, uintptr_t bias, uintptr_t normed,
         uintptr_t summed, float eps, float offset, int threads, ExtentList extents, RotationTables rotary) {
        py::gil_scoped_release release;
        norm_fwd({static_cast<DType>(dtype), centred, shape(sizes), rows(x), rows(residual), at(weight), at(bias), at(normed), at(summed),
                  eps, offset, rotation(rotary)},
                 threads, Extents(std::move(extents)));
      },
      py::arg("dtype"), py::arg("centred"), py::arg("sizes"), py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
      py::arg("normed"), py::arg("summed"), py::arg("eps"), py::arg("offset"), py::arg("threads"), kExtents,
      py::arg("rotary") = RotationTables());
  m.def(
      "norm_bwd",
      [](int dtype, bool centred, std::array<int64_t, 4> sizes, Rows grad, Rows grad_summed, Rows summed, uintptr_t weight, uintptr_t d_x,
         uintptr_t d_weight, uintptr_t d_bias, float eps, float offset, int threads, ExtentList extents, RotationTables rotary) {
        py::gil_scoped_release release;
        norm_bwd({static_cast<DType>(dtype), centred, shape(sizes), rows(grad), rows(grad_summed), rows(summed), at(weight), at(d_x),
                  at(d_weight), at(d_bias), eps, offset, rotation(rotary)},
                 threads, Extents(std::move(extents)));
      },
      py::arg("dtype"), py::arg("centred"), py::arg("sizes"), py::arg("grad"), py::arg("grad_summed"), py::arg("summed"),
      py::arg("weight"), py::arg("d_x"), py::arg("d_weight"), py::arg("d_bias"), py::arg("eps"), py::arg("offset"), py::arg("threads"),
      kExtents, py::arg("rotary") = RotationTables());
  m.def(
      "silu_mul_fwd",
      [](int dtype, uintptr_t up, int64_t up_stride, uintptr_t out, int64_t rows, int64_t cols, int threads,
         ExtentList extents) {
        py::gil_scoped_release release;
        silu_mul_fwd(static_cast<DType>(dtype), at(up), up_stride, at(out), rows, cols, threads, Extents(std::move(extents)));
      },
      py::arg("dtype"), py::arg("up"), py::arg("up_stride"), py::arg("out"), py::arg("rows"), py::arg("cols"), py::arg("threads"),
      kExtents);
  m.def(
      "silu_mul_bwd",
      [](int dtype, uintptr_t grad, uintptr_t up, int64_t up_stride, uintptr_t grad_up, uintptr_t hidden, int64_t rows, int64_t cols,
         int threads, ExtentList extents) {
        py::gil_scoped_release release;
        silu_mul_bwd(static_cast<DType>(dtype), at(grad), at(up), up_stride, at(grad_up), at(hidden), rows, cols, threads,
                     Extents(std::move(extents)));
      },
      py::arg("dtype"), py::arg("grad"), py::arg("up"), py::arg("up_stride"), py::arg("grad_up"), py::arg("hidden"), py::arg("rows"),
      py::arg("cols"), py::arg("threads"), kExtents);
}
