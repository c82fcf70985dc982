// The row kernels of losses by softplus and sigmoid: a part of row_kernels_impl.h.
#pragma once

#include <cstdint>

#include "vec.h"

namespace m3bind::cpu {
namespace {

typedef double DoubleVec __attribute__((vector_size(kLanes * 8)));

// Vectors that are added in float before their sum is added in double: rounding errors of equal
// values add up, and at the start of a training all logits are about equal.
constexpr int64_t kRun = 8;

class LaneSums {
 public:
  void add(Vec v) { run_ += v; }
  void end_run() {
    total_ += __builtin_convertvector(run_, DoubleVec);
    run_ = Vec{};
  }
  double total() const {
    double sum = 0;
    for (int64_t l = 0; l < kLanes; ++l) sum += total_[l];
    return sum;
  }

 private:
  Vec run_ = {};
  DoubleVec total_ = {};
};

// e^-a for a >= 0, to 1e-7; 0 below the normal range (numbers there are slow, also in the GEMMs
// that follow), NaN for NaN.
inline Vec exp_minus(Vec a) {
  constexpr float kLargest = 87.336f;  // e^-kLargest is just above 2^-126
  constexpr float kLog2E = 1.44269504f;
  // ln(2) in two parts: a whole number up to 126 times the first is exact.
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const Vec bounded = a > kLargest ? splat(kLargest) : a;
  const Vec whole = fma(bounded, splat(kLog2E), splat(kRounding)) - kRounding;
  const Vec rest = fma(whole, splat(-kLn2Low), fma(whole, splat(-kLn2High), bounded));
  return a > kLargest ? Vec{} : exp2_parts(-whole, rest * -kLog2E);
}

// log(1 + e) for e from 0 to 1, to 1.6e-7 of itself however small e is (minimax polynomial of
// degree 9 of log(1 + e) / e).
inline Vec log1p(Vec e) {
  Vec p = splat(-0.00324402517f);
  constexpr float kCoefficients[] = {0.0198514629f, -0.0569595322f, 0.106036551f,
                                     -0.153055921f, 0.196759388f,   -0.249541342f,
                                     0.333299637f,  -0.499999017f,  1.0f};
  for (const float c : kCoefficients) p = fma(p, e, splat(c));
  return p * e;
}

// Adds softplus(s), and in `sigmoids` sigmoid(s), both by one exponential; returns the latter.
template <bool kGradient>
inline Vec add_softplus(Vec s, LaneSums& softplus, LaneSums& sigmoids) {
  const Vec size = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(s) & 0x7fffffff);
  const Vec e = exp_minus(size);
  softplus.add((s > 0.0f ? s : Vec{}) + log1p(e));
  if (!kGradient) return s;
  const Vec sigmoid = (s > 0.0f ? splat(1.0f) : e) / (1.0f + e);
  sigmoids.add(sigmoid);
  return sigmoid;
}

template <bool kGradient>
inline void softplus_row(const float* s, float* out, int64_t count, float weight,
                         LaneSums& softplus, LaneSums& sigmoids) {
  int64_t j = 0;
  while (j + kLanes <= count) {
    const int64_t whole = (count - j) / kLanes;
    const int64_t end = j + (whole < kRun ? whole : kRun) * kLanes;
    for (; j < end; j += kLanes) {
      const Vec sigmoid = add_softplus<kGradient>(load(s + j), softplus, sigmoids);
      if (kGradient) store(out + j, sigmoid * weight);
    }
    softplus.end_run();
    if (kGradient) sigmoids.end_run();
  }
  if (j == count) return;
  // Both are 0 at -inf.
  const Vec last = load_part(s + j, count - j, -kInf);
  const Vec sigmoid = add_softplus<kGradient>(last, softplus, sigmoids);
  if (kGradient) store_part(out + j, sigmoid * weight, count - j);
  softplus.end_run();
  if (kGradient) sigmoids.end_run();
}

double softplus_sum(const float* s, int64_t count) {
  LaneSums softplus, unused;
  softplus_row<false>(s, nullptr, count, 1, softplus, unused);
  return softplus.total();
}

SigmoidSums sigmoid(float* s, int64_t count, float weight) {
  LaneSums softplus, sigmoids;
  softplus_row<true>(s, s, count, weight, softplus, sigmoids);
  return {softplus.total(), sigmoids.total()};
}

void affine(float* s, int64_t count, float factor, float summand) {
  change_row(s, count,
             [&](Vec v, int64_t, int64_t) { return fma(v, splat(factor), splat(summand)); });
}

}  // namespace
}  // namespace m3bind::cpu
