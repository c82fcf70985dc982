// The passes over a tile of dot products that are not GEMMs, one set an instruction set.
#pragma once

#include <cstdint>

#include "distill_kernels.h"
#include "factor.h"

namespace m3bind::cpu {

struct SigmoidSums {
  double softplus, sigmoid, by_dot;
};

// S [rows, cols] are dot products, contiguous; where a pair is left out, S holds -inf. Sums along
// rows and columns are added in float, and those of rows to a double.
struct RowKernels {
  // E = exp2(S * factor - shift), added to row_sum[rows] and col_sum[cols].
  void (*sum_shifted)(const float* s, int64_t rows, int64_t cols, Factor factor, float shift,
                      double* row_sum, float* col_sum);
  // Maxima of S * factor, merged into row_max[rows] and col_max[cols]; NaN is passed over.
  void (*maxima)(const float* s, int64_t rows, int64_t cols, Factor factor, float* row_max,
                 float* col_max);
  // exp2(S * factor - row_max[i]) added to row_sum, exp2(S * factor - col_max[j]) to col_sum.
  void (*sum_own_shift)(const float* s, int64_t rows, int64_t cols, Factor factor,
                        const float* row_max, const float* col_max, double* row_sum,
                        float* col_sum);
  // S = exp2(S * factor - shift) * (row_weight[i] + col_weight[j]): one exponential a logit. The
  // sum of the new values times the old ones is added to by_dot[rows], pairs left out apart.
  void (*gradient_shifted)(float* s, int64_t rows, int64_t cols, Factor factor, float shift,
                           const float* row_weight, const float* col_weight, double* by_dot);
  // S = exp2(S * factor - row_shift[i]) * row_weight[i] + the same of the columns.
  void (*gradient_own_shift)(float* s, int64_t rows, int64_t cols, Factor factor,
                             const float* row_shift, const float* row_weight,
                             const float* col_shift, const float* col_weight, double* by_dot);
  // out[i] = sum over d of a[i, d] * b[i, d]; both contiguous.
  void (*row_dots)(const float* a, const float* b, int64_t rows, int64_t cols, double* out);
  // s *= factor, element by element.
  void (*multiply)(float* s, int64_t count, float factor);
  // sums += values * factor, element by element.
  void (*add_multiple)(float* sums, const float* values, int64_t count, float factor);
  // sums += values * factor, in double.
  void (*add_wide)(double* sums, const float* values, int64_t count, double factor);
  // sums += constant * factors, each product in double and rounded once.
  void (*add_narrow)(float* sums, const double* factors, int64_t count, double constant);
  // out = bfloat16 values as float.
  void (*widen)(const uint16_t* values, int64_t count, float* out);
  // logits = dots * factor + summand, rounded once.
  void (*affine)(const float* dots, float* logits, int64_t count, float factor, float summand);
  // The sum of softplus(logits).
  double (*softplus_sum)(const float* logits, int64_t count);
  // dots = weight * sigmoid(logits). The sums have no weight: of softplus(logits), of
  // sigmoid(logits), and of that times the dots that were there.
  SigmoidSums (*sigmoid)(const float* logits, float* dots, int64_t count, float weight);
  // Derivatives in S beyond row_limit[i] + col_limit[j] are told to `found` and become 0. What
  // rounding the others to bfloat16 loses is added to row_lost and col_lost.
  void (*set_apart)(float* s, int64_t rows, int64_t cols, const float* row_limit,
                    const float* col_limit, double* row_lost, float* col_lost,
                    void (*found)(void* to, int64_t row, int64_t col, float value), void* to);
  DistillKernels distill;
};

// Rows whose columns are summed in float.
inline constexpr int64_t kBlockRows = 64;

const RowKernels& row_kernels_default();
#ifdef M3BIND_X86
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();
#endif

// What is in use: the best of this processor, or what M3BIND_CPU_CAPABILITY names. Throws
// std::invalid_argument where that is unknown or beyond this processor.
struct Capability {
  const char* name;
  const RowKernels& kernels;
  bool blocked_products;  // of float32
  bool bf16_products;     // the processor multiplies bfloat16
};
const Capability& capability();
inline const RowKernels& row_kernels() { return capability().kernels; }

}  // namespace m3bind::cpu
