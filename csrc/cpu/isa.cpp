#include "cpu/isa.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vlmkern {
namespace {

#if defined(__x86_64__)
uint64_t xgetbv0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t(hi) << 32) | lo;
}

Isa detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::portable;
  const bool osxsave = c & bit_OSXSAVE, avx = c & bit_AVX, fma = c & bit_FMA, f16c = c & bit_F16C;
  if (!(osxsave && avx && fma && f16c)) return Isa::portable;
  // the OS must save the wider registers on a context switch, or their contents are lost
  const uint64_t saved = xgetbv0();
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6;
  if ((saved & kYmm) != kYmm) return Isa::portable;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return Isa::portable;
  const unsigned kAvx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if ((saved & kZmm) != kZmm || (b & kAvx512) != kAvx512) return Isa::avx2;
  constexpr unsigned kBf16 = 1u << 5;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kBf16)) return Isa::avx512;
  return Isa::avx512_bf16;
}
#else
Isa detect() { return Isa::portable; }
#endif

bool compiled(Isa isa) {
  switch (isa) {
    case Isa::portable: return true;
#if VLMKERN_HAVE_AVX2
    case Isa::avx2: return true;
#endif
#if VLMKERN_HAVE_AVX512
    case Isa::avx512: return true;
#endif
#if VLMKERN_HAVE_AVX512_BF16
    case Isa::avx512_bf16: return true;
#endif
    default: return false;
  }
}

Isa best_usable() {
  Isa best = Isa::portable;
  for (Isa isa : kAllIsas)
    if (usable(isa)) best = isa;
  return best;
}

Isa resolve() {
  const char* wanted = std::getenv("VLMKERN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_usable();
  std::string names;
  for (Isa isa : kAllIsas) {
    if (std::string(wanted) == name(isa)) {
      if (usable(isa)) return isa;
      throw std::runtime_error(std::string("VLMKERN_CPU_ISA=") + wanted + ": this CPU or build has no such kernels; the best here is " +
                               name(best_usable()));
    }
    names += std::string(names.empty() ? "" : ", ") + name(isa);
  }
  throw std::runtime_error(std::string("VLMKERN_CPU_ISA=") + wanted + ": expected one of " + names);
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
  }
  return "unknown";
}

bool usable(Isa isa) {
  static const Isa cpu = detect();
  return compiled(isa) && static_cast<int>(isa) <= static_cast<int>(cpu);
}

Isa active() {
  static const Isa isa = resolve();
  return isa;
}

}  // namespace vlmkern
