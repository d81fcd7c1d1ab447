// What the CUDA half of the extension was built for and sees. Torch-free; statically linked runtime.
#pragma once

#include <string>
#include <vector>

namespace vlmkern {

struct CudaReport {
  int runtime_version = 0;          // of the linked runtime, e.g. 13000
  int driver_version = 0;           // 0 when no driver is installed
  std::string error;                // why there are no devices; empty when there are
  std::vector<std::string> devices; // "name (sm_90)"
};

CudaReport cuda_report();

}  // namespace vlmkern
