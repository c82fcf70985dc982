// Which set of row kernels this processor runs.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "row_kernels.h"

namespace m3bind::cpu {
namespace {

struct Candidate {
  const RowKernels& kernels;
  bool supported;
};

const RowKernels& choose() {
  const Candidate candidates[] = {
#ifdef M3BIND_X86
      {row_kernels_avx512(), __builtin_cpu_supports("avx512f") != 0},
      {row_kernels_avx2(),
       __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0},
#endif
      {row_kernels_default(), true},
  };
  const char* named = std::getenv("M3BIND_CPU_CAPABILITY");
  const std::string wanted = named == nullptr ? "" : named;
  std::string known;
  for (const Candidate& candidate : candidates) {
    if (wanted.empty() ? candidate.supported : wanted == candidate.kernels.name) {
      if (candidate.supported) return candidate.kernels;
      throw std::invalid_argument("M3BIND_CPU_CAPABILITY=" + wanted +
                                  ": this processor does not have it");
    }
    known += known.empty() ? "" : ", ";
    known += candidate.kernels.name;
  }
  throw std::invalid_argument("M3BIND_CPU_CAPABILITY=" + wanted + ": choose one of " + known);
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& chosen = choose();
  return chosen;
}

}  // namespace m3bind::cpu
