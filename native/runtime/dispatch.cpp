#include "runtime/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace coterie {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

bool has_avx2_vnni() {
  unsigned a = 7, b = 0, c = 1, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return has_avx2() && (a & 1u << 4);
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"); }

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// Intel's CPUs multiply bf16 at half the rate of float32.
bool bf16_is_fast() { return !__builtin_cpu_is("intel"); }

// AMX needs the CPU's tiles, bf16 and int8, and the kernel's permission to use the tile registers.
bool has_amx() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if ((d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return has_avx512_bf16() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#if defined(COTERIE_EMULATE)
constexpr bool kEmulated = true;  // AVX-VNNI and AVX512 in plain C++, on any CPU that has AVX2
#else
constexpr bool kEmulated = false;
#endif

struct Variant {
  const Kernels* kernels;
  bool available;
  bool automatic;    // chosen without being asked for
  bool fast = true;  // or only where nothing else is there
};

const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = {
#if defined(__x86_64__)
      {&kAmx, has_amx(), true},
      {&kAvx512Bf16, kEmulated || has_avx512_bf16(), !kEmulated, bf16_is_fast()},
      {&kAvx512Vnni, kEmulated || has_avx512_vnni(), !kEmulated},
      {&kAvx512, kEmulated || has_avx512(), !kEmulated},
      {&kAvx2Vnni, kEmulated || has_avx2_vnni(), !kEmulated},
      {&kAvx2, has_avx2(), true},
      {&kAmxEmulated, kEmulated || has_avx512_bf16(), false},
#endif
      {&kScalar, true, true},
  };
  return all;
}

struct Choice {
  const Kernels* kernels;
  std::string reason;
};

const Kernels* named(const std::string& name) {
  std::string names;
  for (const Variant& v : variants()) {
    if (v.kernels->name == name) {
      if (v.available) return v.kernels;
      throw std::runtime_error("COTERIE_ISA=" + name + ": this CPU does not have it; unset it or see `coterie doctor`");
    }
    if (v.automatic) names += (names.empty() ? "" : ", ") + std::string(v.kernels->name);
  }
  throw std::runtime_error("COTERIE_ISA=" + name + " is not an instruction set; expected one of " + names);
}

Choice choose() {
  const char* wanted = std::getenv("COTERIE_ISA");
  if (wanted && *wanted) return {named(wanted), "forced by COTERIE_ISA"};
  for (const Variant& v : variants())
    if (v.available && v.automatic && v.fast) return {v.kernels, "the fastest this CPU has"};
  return {&kScalar, "the only one built"};
}

Choice& choice() {
  static Choice chosen = choose();
  return chosen;
}

}  // namespace

std::vector<const Kernels*> available_kernels(bool automatic) {
  std::vector<const Kernels*> found;
  for (const Variant& v : variants())
    if (v.available && v.automatic == automatic) found.push_back(v.kernels);
  return found;
}

const Kernels& kernels() { return *choice().kernels; }
const std::string& kernels_reason() { return choice().reason; }
void use_kernels(const std::string& name) { choice() = {named(name), "asked for by name"}; }

}  // namespace coterie
