// The upstream gradients of one direction, in the form in which a backward pass weighs
// exponentials.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "base2.h"

namespace m3bind::cpu {

// One direction's LSE (base 2) and the upstream gradients of its statistics.
struct Direction {
  std::vector<double> lse, grad, positive, total;

  // Of natural LSEs; without upstream gradients.
  explicit Direction(std::vector<double> natural)
      : lse(std::move(natural)), grad(lse.size()), positive(lse.size()), total(lse.size()) {
    for (double& v : lse) v = in_base2(v);
  }

  // grad * softmax at one logit
  double weight(int64_t i, double log2_logit) const {
    return grad[i] == 0 ? 0 : grad[i] * softmax_base2(log2_logit, lse[i]);
  }

  // grad * 2^(shift - lse), so that times 2^(logit - shift) it is grad * softmax. Empty where an
  // LSE is below `smallest`, or a weight is too large or not a number.
  std::vector<float> weights(double shift, double smallest) const {
    std::vector<float> out(lse.size());
    for (size_t i = 0; i < lse.size(); ++i) {
      const double weight = grad[i] * std::exp2(shift - lse[i]);
      if (!(lse[i] >= smallest && std::abs(weight) <= kLargestWeight)) return {};
      out[i] = static_cast<float>(weight);
    }
    return out;
  }

  std::vector<float> own_shifts() const { return {lse.begin(), lse.end()}; }

  // grad * 2^(own shift - lse): makes up for the rounding of the LSE to its own shift.
  std::vector<float> own_weights() const {
    std::vector<float> out(lse.size());
    for (size_t i = 0; i < lse.size(); ++i)
      out[i] = static_cast<float>(grad[i] * softmax_base2(static_cast<float>(lse[i]), lse[i]));
    return out;
  }
};

}  // namespace m3bind::cpu
