// Which instruction set the kernels run on: what this CPU and OS have, read once from CPUID and XGETBV, and of the sets that
// were compiled the best, or the one that VLMKERN_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

namespace vlmkern {

// Sets of features, each with kernels of its own. One comes after those that it extends. amx_emulated is AMX's kernels on plain C++,
// to test them anywhere; it is never chosen unless named.
enum class Isa : int { portable, amx_emulated, avx2, avx512, avx512_bf16, amx };

inline constexpr Isa kAllIsas[] = {Isa::portable, Isa::amx_emulated, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

const char* name(Isa isa);

// Whether an ISA has all features of another, itself included.
bool extends(Isa isa, Isa other);

// True when kernels for this ISA were compiled in and this CPU and OS run them.
bool usable(Isa isa);

// Whether it is for tests alone.
bool emulated(Isa isa);

// The ISA in use. Throws std::runtime_error when VLMKERN_CPU_ISA names an unknown or unusable one.
Isa active();

// As CPUID spells it, e.g. "AuthenticAMD"; empty where there is none.
std::string cpu_vendor();

// Of those that kernels here or libraries beside them ask for, the features that this CPU has and its OS saves, e.g. "avx2".
std::vector<std::string> cpu_features();

}  // namespace vlmkern
