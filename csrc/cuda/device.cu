#include "cuda/device.h"

#include <cuda_runtime.h>

namespace vlmkern {

CudaReport cuda_report() {
  CudaReport report;
  cudaRuntimeGetVersion(&report.runtime_version);
  cudaDriverGetVersion(&report.driver_version);
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    report.error = cudaGetErrorString(status);
    cudaGetLastError();  // a failed query must not surface later as somebody else's error
    return report;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp prop;
    if (cudaGetDeviceProperties(&prop, i) == cudaSuccess)
      report.devices.push_back(std::string(prop.name) + " (sm_" + std::to_string(prop.major) + std::to_string(prop.minor) + ")");
  }
  if (report.devices.empty()) report.error = "no CUDA device";
  return report;
}

}  // namespace vlmkern
