// The one table between Python and C++: raw pointers as integers, sizes and strides in elements.
// Nothing of torch; the callers in vlmkern/native own the tensors and keep them alive for the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/isa.h"
#if VLMKERN_HAVE_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace vlmkern;

namespace {

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAllIsas)
    if (usable(isa)) names.push_back(name(isa));
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

  m.def("isa", [] { return name(active()); }, "The instruction set in use");
  m.def("usable_isas", usable_isas, "Instruction sets that this build and CPU can run, lowest first");
  m.def("cuda", cuda, "What the CUDA half was built for and sees");

  m.def(
      "silu_mul_fwd",
      [](int dtype, uintptr_t up, int64_t up_stride, uintptr_t out, int64_t rows, int64_t cols, int threads) {
        py::gil_scoped_release release;
        silu_mul_fwd(static_cast<DType>(dtype), at(up), up_stride, at(out), rows, cols, threads);
      },
      py::arg("dtype"), py::arg("up"), py::arg("up_stride"), py::arg("out"), py::arg("rows"), py::arg("cols"), py::arg("threads"));
  m.def(
      "silu_mul_bwd",
      [](int dtype, uintptr_t grad, uintptr_t up, int64_t up_stride, uintptr_t grad_up, uintptr_t hidden, int64_t rows, int64_t cols,
         int threads) {
        py::gil_scoped_release release;
        silu_mul_bwd(static_cast<DType>(dtype), at(grad), at(up), up_stride, at(grad_up), at(hidden), rows, cols, threads);
      },
      py::arg("dtype"), py::arg("grad"), py::arg("up"), py::arg("up_stride"), py::arg("grad_up"), py::arg("hidden"), py::arg("rows"),
      py::arg("cols"), py::arg("threads"));
}
