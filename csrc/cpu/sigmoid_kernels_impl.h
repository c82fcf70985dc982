// The row kernels of losses by softplus and sigmoid: a part of row_kernels_impl.h.
#pragma once

#include <cstdint>

#include "vec.h"

namespace m3bind::cpu {
namespace {

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
  const Vec whole = multiply_add(bounded, splat(kLog2E), splat(kRounding)) - kRounding;
  const Vec rest =
      multiply_add(whole, splat(-kLn2Low), multiply_add(whole, splat(-kLn2High), bounded));
  return a > kLargest ? Vec{} : exp2_parts(-whole, rest * -kLog2E);
}

// log(1 + e) for e from 0 to 1, to 1.6e-7 of itself however small e is (minimax polynomial of
// degree 9 of log(1 + e) / e).
inline Vec log1p(Vec e) {
  Vec p = splat(-0.00324402517f);
  constexpr float kCoefficients[] = {0.0198514629f, -0.0569595322f, 0.106036551f,
                                     -0.153055921f, 0.196759388f,   -0.249541342f,
                                     0.333299637f,  -0.499999017f,  1.0f};
  for (const float c : kCoefficients) p = multiply_add(p, e, splat(c));
  return p * e;
}

// max(s, 0) + log(1 + e^-|s|) and its derivative, by one exponential.
struct Softplus {
  Vec e, value;
  explicit Softplus(Vec s)
      : e(exp_minus(reinterpret_cast<Vec>(reinterpret_cast<IntVec>(s) & 0x7fffffff))),
        value((s > 0.0f ? s : Vec{}) + log1p(e)) {}
  Vec sigmoid(Vec s) const { return (s > 0.0f ? splat(1.0f) : e) / (1.0f + e); }
};

// Calls f(first column, columns) on every vector of a row, and end_run() after kRun of them.
template <class F, class G>
inline void for_vectors(int64_t count, const F& f, const G& end_run) {
  int64_t j = 0;
  while (j + kLanes <= count) {
    const int64_t whole = (count - j) / kLanes;
    const int64_t end = j + (whole < kRun ? whole : kRun) * kLanes;
    for (; j < end; j += kLanes) f(j, kLanes);
    end_run();
  }
  if (j < count) f(j, count - j);
  end_run();
}

// The softplus and the sigmoid of -inf, which fills up the last vector, are 0.
inline Vec load_logits(const float* p, int64_t count) {
  return count == kLanes ? load(p) : load_part(p, count, -kInf);
}
inline void store_up_to(float* p, Vec v, int64_t count) {
  if (count == kLanes)
    store(p, v);
  else
    store_part(p, v, count);
}

double softplus_sum(const float* logits, int64_t count) {
  LaneSums softplus;
  for_vectors(
      count,
      [&](int64_t j, int64_t columns) {
        softplus.add(Softplus(load_logits(logits + j, columns)).value);
      },
      [&] { softplus.end_run(); });
  return softplus.total();
}

SigmoidSums sigmoid(const float* logits, float* dots, int64_t count, float weight) {
  LaneSums softplus, sigmoids, by_dot;
  for_vectors(
      count,
      [&](int64_t j, int64_t columns) {
        const Vec s = load_logits(logits + j, columns);
        const Softplus of_s(s);
        const Vec grad = of_s.sigmoid(s);
        softplus.add(of_s.value);
        sigmoids.add(grad);
        by_dot.add(grad * load_up_to(dots + j, columns));
        store_up_to(dots + j, grad * weight, columns);
      },
      [&] {
        softplus.end_run();
        sigmoids.end_run();
        by_dot.end_run();
      });
  return {softplus.total(), sigmoids.total(), by_dot.total()};
}

void affine(const float* dots, float* logits, int64_t count, float factor, float summand) {
  const Vec times = splat(factor), plus = splat(summand);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(logits + j, fma(load(dots + j), times, plus));
  if (j < count)
    store_part(logits + j, fma(load_part(dots + j, count - j, 0), times, plus), count - j);
}

}  // namespace
}  // namespace m3bind::cpu
