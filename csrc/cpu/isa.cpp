#include "cpu/isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vlmkern {
namespace {

enum Register { ebx, ecx, edx, eax };

// Registers that the OS must save on a context switch, or their contents are lost: bits of XCR0.
constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60006;

struct Feature {
  const char* name;
  unsigned leaf, subleaf;
  Register where;
  int bit;
  uint64_t saved;
};

// Intel SDM, volume 2A, CPUID
constexpr Feature kFeatures[] = {
    {"avx", 1, 0, ecx, 28, kYmm},         {"fma", 1, 0, ecx, 12, kYmm},         {"f16c", 1, 0, ecx, 29, kYmm},
    {"avx2", 7, 0, ebx, 5, kYmm},         {"avx512f", 7, 0, ebx, 16, kZmm},     {"avx512dq", 7, 0, ebx, 17, kZmm},
    {"avx512bw", 7, 0, ebx, 30, kZmm},    {"avx512vl", 7, 0, ebx, 31, kZmm},    {"avx512_bf16", 7, 1, eax, 5, kZmm},
    {"avx512_fp16", 7, 0, edx, 23, kZmm}, {"amx_tile", 7, 0, edx, 24, kTiles}, {"amx_bf16", 7, 0, edx, 22, kTiles},
    {"amx_fp16", 7, 1, eax, 21, kTiles},
};
constexpr int kCount = sizeof kFeatures / sizeof kFeatures[0];

using Set = uint32_t;  // a bit per entry of kFeatures
static_assert(kCount < 32);

constexpr bool same(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

template <class... Names>
constexpr Set set_of(Names... names) {
  Set set = 0;
  for (int i = 0; i < kCount; ++i)
    if ((same(kFeatures[i].name, names) || ...)) set |= Set(1) << i;
  return set;
}

constexpr Set kAvx2 = set_of("avx", "fma", "f16c", "avx2");
// none of a CPU: of kernels that do without what they are made for
constexpr Set kEmulated = Set(1) << 31;
constexpr Set kAvx512 = kAvx2 | set_of("avx512f", "avx512dq", "avx512bw", "avx512vl");

constexpr Set kAvx512Bf16 = kAvx512 | set_of("avx512_bf16");

struct Kind {
  Isa isa;
  const char* name;
  Set needs;
  bool compiled;
};

constexpr Kind kKinds[] = {
    {Isa::portable, "portable", 0, true},
    {Isa::amx_emulated, "amx_emulated", kEmulated, VLMKERN_HAVE_AMX_EMULATED},
    {Isa::avx2, "avx2", kAvx2, VLMKERN_HAVE_AVX2},
    {Isa::avx512, "avx512", kAvx512, VLMKERN_HAVE_AVX512},
    {Isa::avx512_bf16, "avx512_bf16", kAvx512Bf16, VLMKERN_HAVE_AVX512_BF16},
    {Isa::amx, "amx", kAvx512Bf16 | set_of("amx_tile", "amx_bf16"), VLMKERN_HAVE_AMX},
};

const Kind& kind(Isa isa) { return kKinds[static_cast<int>(isa)]; }

struct Cpu {
  std::string vendor;
  Set features = 0;
};

#if defined(__x86_64__)
uint64_t saved_registers() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t(hi) << 32) | lo;
}

Cpu detect() {
  Cpu cpu;
  unsigned r[4];
  if (!__get_cpuid(0, &r[eax], &r[ebx], &r[ecx], &r[edx])) return cpu;
  char vendor[12];
  memcpy(vendor, &r[ebx], 4), memcpy(vendor + 4, &r[edx], 4), memcpy(vendor + 8, &r[ecx], 4);
  cpu.vendor.assign(vendor, sizeof vendor);
  constexpr unsigned kOsxsave = 1u << 27;
  if (!__get_cpuid(1, &r[eax], &r[ebx], &r[ecx], &r[edx]) || !(r[ecx] & kOsxsave)) return cpu;
  const uint64_t saved = saved_registers();
  for (int i = 0; i < kCount; ++i) {
    const Feature& f = kFeatures[i];
    if ((saved & f.saved) == f.saved && __get_cpuid_count(f.leaf, f.subleaf, &r[eax], &r[ebx], &r[ecx], &r[edx]) && (r[f.where] >> f.bit & 1))
      cpu.features |= Set(1) << i;
  }
  return cpu;
}
#else
Cpu detect() { return {}; }
#endif

const Cpu& cpu() {
  static const Cpu here = detect();
  return here;
}

#if defined(__linux__) && defined(__x86_64__)
// Linux asks a process to request the tile registers, once for all its threads, and may refuse.
bool tiles_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#else
bool tiles_granted() { return false; }
#endif

Isa best_usable() {
  Isa best = Isa::portable;
  for (Isa isa : kAllIsas) {
    if (emulated(isa)) continue;
    // there vdpbf16ps runs at half rate: attention of 729 tokens takes 25 ms with it and 17.9 without (Sapphire Rapids)
    if (isa == Isa::avx512_bf16 && cpu().vendor == "GenuineIntel" && usable(Isa::avx512)) continue;
    if (usable(isa)) best = isa;
  }
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
    if (!emulated(isa)) names += std::string(names.empty() ? "" : ", ") + name(isa);
  }
  throw std::runtime_error(std::string("VLMKERN_CPU_ISA=") + wanted + ": expected one of " + names);
}

}  // namespace

const char* name(Isa isa) { return kind(isa).name; }

bool extends(Isa isa, Isa other) { return (kind(other).needs & ~kind(isa).needs) == 0; }

bool emulated(Isa isa) { return kind(isa).needs & kEmulated; }

bool usable(Isa isa) {
  return kind(isa).compiled && (kind(isa).needs & ~(cpu().features | kEmulated)) == 0 && (isa != Isa::amx || tiles_granted());
}

Isa active() {
  static const Isa isa = resolve();
  return isa;
}

std::string cpu_vendor() { return cpu().vendor; }

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
  for (int i = 0; i < kCount; ++i)
    if (cpu().features >> i & 1) names.push_back(kFeatures[i].name);
  return names;
}

}  // namespace vlmkern
