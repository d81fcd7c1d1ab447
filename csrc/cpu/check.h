// What the dispatchers check arguments with before they touch memory, and the scratch they allocate for the kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/dtype.h"

namespace vlmkern {

inline constexpr int64_t kAlignment = 64;
// sizes above this cannot be real and would overflow address arithmetic
inline constexpr int64_t kLimit = int64_t(1) << 48;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void require_dtype(DType dtype) {
  if (!known(dtype)) throw std::invalid_argument("dtype: got code " + std::to_string(int(dtype)) + ", expected 0, 1 or 2");
}

inline void require_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: got " + std::to_string(threads) + ", expected at least 1");
}

// Sizes that are not negative, whose product is real even where some of them are 0.
inline void require_product(const char* what, std::initializer_list<int64_t> sizes) {
  int64_t elements = 1;
  for (int64_t size : sizes) {
    if (size < 0) throw std::invalid_argument(std::string(what) + ": got a size of " + std::to_string(size) + ", which must not be negative");
    if (size != 0 && elements > kLimit / size) throw std::invalid_argument(std::string(what) + ": too large");
    elements *= size != 0 ? size : 1;
  }
}

// A stride over some entries that keeps addresses real; over one entry or none it may be anything.
inline void require_stride(const char* name, int64_t stride, int64_t entries) {
  if (entries > 1 && (stride < 0 || stride > kLimit / entries))
    throw std::invalid_argument(std::string(name) + ": got a stride of " + std::to_string(stride) + " over " + std::to_string(entries) +
                                " entries");
}

// One more than the index of the last of `inner` neighbours at the end of dimensions of (size, stride); 0 without any.
inline int64_t reach(std::initializer_list<std::pair<int64_t, int64_t>> dimensions, int64_t inner) {
  int64_t last = 0;
  for (const auto& [size, stride] : dimensions) {
    if (size == 0) return 0;
    if (size > 1) last += (size - 1) * stride;
  }
  return inner == 0 ? 0 : last + inner;
}

// The elements that lie from each tensor's address on, in the order of a call's tensors; none when the caller does not say.
class Extents {
 public:
  Extents() = default;
  explicit Extents(std::vector<int64_t> extents) : extents_(std::move(extents)) {}

  void require_tensors(size_t count) const {
    if (!extents_.empty() && extents_.size() != count)
      throw std::invalid_argument("extents: got " + std::to_string(extents_.size()) + " of them, expected one for each of " +
                                  std::to_string(count) + " tensors");
  }
  void require_reach(size_t tensor, const std::string& name, int64_t elements) const {
    if (!extents_.empty() && elements > extents_.at(tensor))
      throw std::invalid_argument(name + ": got memory of " + std::to_string(extents_[tensor]) + " elements, expected " +
                                  std::to_string(elements));
  }

 private:
  std::vector<int64_t> extents_;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace vlmkern
