// What the dispatchers check arguments with before they touch memory, and the scratch they allocate for the kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

namespace vlmkern {

inline constexpr int64_t kAlignment = 64;
// sizes above this cannot be real and would overflow address arithmetic
inline constexpr int64_t kLimit = int64_t(1) << 48;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace vlmkern
