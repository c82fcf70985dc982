// Log-sum-exps in base 2, and what their exponentials weigh.
#pragma once

#include <cmath>
#include <limits>

#include "tiling.h"

namespace m3bind::cpu {

// Weights above this could make inf * 0 out of an exponential that underflows.
inline constexpr double kLargestWeight = 1e37;

// A natural LSE. Where nothing was summed every logit is -inf, and any finite shift gives zeros.
inline double in_base2(double natural) {
  return natural == -std::numeric_limits<double>::infinity() ? 0.0 : natural * kLog2E;
}

// 2^(logit - lse); 1 where only the rounding of `lse` to base 2 tells them apart.
inline double softmax_base2(double logit, double lse) {
  const double difference = logit - lse;
  return std::abs(difference) < std::abs(lse) * 0x1p-51 ? 1.0 : std::exp2(difference);
}

}  // namespace m3bind::cpu
