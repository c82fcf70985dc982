// Which instructions of this processor are used.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "row_kernels.h"

namespace m3bind::cpu {
namespace {

struct Candidate {
  Capability capability;
  bool supported;
};

Capability choose() {
#ifdef M3BIND_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
#endif
  const Candidate candidates[] = {
#ifdef M3BIND_X86
      {{"avx512_bf16", row_kernels_avx512(), true, true}, bf16},
      {{"avx512", row_kernels_avx512(), true, false}, avx512},
      {{"avx2", row_kernels_avx2(), false, false}, avx2},
#endif
      {{"default", row_kernels_default(), false, false}, true},
  };
  const char* named = std::getenv("M3BIND_CPU_CAPABILITY");
  const std::string wanted = named == nullptr ? "" : named;
  std::string known;
  for (const Candidate& candidate : candidates) {
    const char* name = candidate.capability.name;
    if (wanted.empty() ? candidate.supported : wanted == name) {
      if (candidate.supported) return candidate.capability;
      throw std::invalid_argument("M3BIND_CPU_CAPABILITY=" + wanted +
                                  ": this processor does not have it");
    }
    known += known.empty() ? "" : ", ";
    known += name;
  }
  throw std::invalid_argument("M3BIND_CPU_CAPABILITY=" + wanted + ": choose one of " + known);
}

}  // namespace

const Capability& capability() {
  static const Capability chosen = choose();
  return chosen;
}

}  // namespace m3bind::cpu
