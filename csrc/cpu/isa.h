// Which vector instruction set the kernels run on: read once from CPUID and XGETBV,
// lowered by VLMKERN_CPU_ISA. Each level includes the ones before it.
#pragma once

namespace vlmkern {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

inline constexpr Isa kAllIsas[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

const char* name(Isa isa);

// True when kernels for this level were compiled in and this CPU and OS run them.
bool usable(Isa isa);

// The level in use. Throws std::runtime_error when VLMKERN_CPU_ISA names an unknown or unusable level.
Isa active();

}  // namespace vlmkern
