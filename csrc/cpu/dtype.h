// Element types of tensors, by the codes that Python passes.
#pragma once

#include <cstdint>

namespace vlmkern {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline bool known(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16; }
inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace vlmkern
