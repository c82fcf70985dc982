// The one source of the row kernels, compiled once an instruction set (see CMakeLists.txt).
//
// The includer defines M3BIND_LANES and M3BIND_NAME. No standard header with functions: see vec.h.
#include <cstdint>

#include "row_kernels.h"
#include "sigmoid_kernels_impl.h"
#include "vec.h"

namespace m3bind::cpu {
namespace {

struct VecFactor {
  Vec high, low;
  explicit VecFactor(Factor f) : high(splat(f.high)), low(splat(f.low)) {}
  // In this order what is rounded first is as small as the result.
  Vec minus(Vec s, Vec shift) const { return fma(s, low, fma(s, high, -shift)); }
};

// Sums over kRows rows; `shift_row` and `shift_col` may be the same constant.
template <int kRows, bool kOwnShift>
inline void sum_rows(const float* s, int64_t cols, VecFactor factor, const float* row_shift,
                     Vec common, const float* col_shift, double* row_sum, float* col_sum) {
  Vec rows[kRows] = {};
  Vec shifts[kRows];
  for (int r = 0; r < kRows; ++r) shifts[r] = kOwnShift ? splat(row_shift[r]) : common;
  const auto column = [&](Vec(&dots)[kRows], Vec own) {
    Vec total = {};
    for (int r = 0; r < kRows; ++r) {
      const Vec e = exp2(factor.minus(dots[r], shifts[r]));
      rows[r] += e;
      total += kOwnShift ? exp2(factor.minus(dots[r], own)) : e;
    }
    return total;
  };
  Vec dots[kRows];
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) {
    for (int r = 0; r < kRows; ++r) dots[r] = load(s + r * cols + j);
    const Vec own = kOwnShift ? load(col_shift + j) : common;
    store(col_sum + j, load(col_sum + j) + column(dots, own));
  }
  if (j < cols) {
    const int64_t count = cols - j;
    for (int r = 0; r < kRows; ++r) dots[r] = load_part(s + r * cols + j, count, -kInf);
    const Vec own = kOwnShift ? load_part(col_shift + j, count, 0) : common;
    store_part(col_sum + j, load_part(col_sum + j, count, 0) + column(dots, own), count);
  }
  for (int r = 0; r < kRows; ++r) row_sum[r] += reduce_add(rows[r]);
}

template <bool kOwnShift>
inline void sum_tile(const float* s, int64_t rows, int64_t cols, Factor factor,
                     const float* row_shift, float common, const float* col_shift, double* row_sum,
                     float* col_sum) {
  const VecFactor vec_factor(factor);
  const Vec vec_common = splat(common);
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    sum_rows<4, kOwnShift>(s + i * cols, cols, vec_factor, kOwnShift ? row_shift + i : nullptr,
                           vec_common, col_shift, row_sum + i, col_sum);
  for (; i < rows; ++i)
    sum_rows<1, kOwnShift>(s + i * cols, cols, vec_factor, kOwnShift ? row_shift + i : nullptr,
                           vec_common, col_shift, row_sum + i, col_sum);
}

void sum_shifted(const float* s, int64_t rows, int64_t cols, Factor factor, float shift,
                 double* row_sum, float* col_sum) {
  sum_tile<false>(s, rows, cols, factor, nullptr, shift, nullptr, row_sum, col_sum);
}

void sum_own_shift(const float* s, int64_t rows, int64_t cols, Factor factor, const float* row_max,
                   const float* col_max, double* row_sum, float* col_sum) {
  sum_tile<true>(s, rows, cols, factor, row_max, 0, col_max, row_sum, col_sum);
}

void maxima(const float* s, int64_t rows, int64_t cols, Factor factor, float* row_max,
            float* col_max) {
  const VecFactor vec_factor(factor);
  for (int64_t i = 0; i < rows; ++i) {
    const float* p = s + i * cols;
    Vec best = splat(row_max[i]);
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) {
      const Vec t = vec_factor.minus(load(p + j), Vec{});
      const Vec col = load(col_max + j);
      best = t > best ? t : best;
      store(col_max + j, t > col ? t : col);
    }
    if (j < cols) {
      const Vec t = vec_factor.minus(load_part(p + j, cols - j, -kInf), Vec{});
      const Vec col = load_part(col_max + j, cols - j, -kInf);
      best = t > best ? t : best;
      store_part(col_max + j, t > col ? t : col, cols - j);
    }
    row_max[i] = reduce_max(best);
  }
}

// Replaces a row of dot products by derivatives(dots, first column, count); returns the sum of
// derivative * dot. Where a pair is left out the dot is -inf, and counts for nothing.
template <class F>
inline float derive_row(float* p, int64_t cols, const F& derivatives) {
  Vec sum = {};
  const auto derive = [&](Vec dots, int64_t j, int64_t count) {
    const Vec grad = derivatives(dots, j, count);
    sum = multiply_add(grad, dots == -kInf ? Vec{} : dots, sum);
    return grad;
  };
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) store(p + j, derive(load(p + j), j, kLanes));
  if (j < cols) {
    const int64_t count = cols - j;
    store_part(p + j, derive(load_part(p + j, count, -kInf), j, count), count);
  }
  return reduce_add(sum);
}

void gradient_shifted(float* s, int64_t rows, int64_t cols, Factor factor, float shift,
                      const float* row_weight, const float* col_weight, double* by_dot) {
  const VecFactor vec_factor(factor);
  const Vec common = splat(shift);
  for (int64_t i = 0; i < rows; ++i) {
    const Vec weight = splat(row_weight[i]);
    by_dot[i] += derive_row(s + i * cols, cols, [&](Vec dots, int64_t j, int64_t count) {
      return exp2(vec_factor.minus(dots, common)) * (weight + load_up_to(col_weight + j, count));
    });
  }
}

void gradient_own_shift(float* s, int64_t rows, int64_t cols, Factor factor, const float* row_shift,
                        const float* row_weight, const float* col_shift, const float* col_weight,
                        double* by_dot) {
  const VecFactor vec_factor(factor);
  for (int64_t i = 0; i < rows; ++i) {
    const Vec lse = splat(row_shift[i]);
    const Vec grad = splat(row_weight[i]);
    by_dot[i] += derive_row(s + i * cols, cols, [&](Vec dots, int64_t j, int64_t count) {
      const Vec by_row = exp2(vec_factor.minus(dots, lse)) * grad;
      const Vec by_col = exp2(vec_factor.minus(dots, load_up_to(col_shift + j, count)));
      return by_row + by_col * load_up_to(col_weight + j, count);
    });
  }
}

void row_dots(const float* a, const float* b, int64_t rows, int64_t cols, double* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* p = a + i * cols;
    const float* q = b + i * cols;
    Vec total = {};
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) total = multiply_add(load(p + j), load(q + j), total);
    if (j < cols) total += load_part(p + j, cols - j, 0) * load_part(q + j, cols - j, 0);
    out[i] = reduce_add(total);
  }
}

void multiply(float* s, int64_t count, float factor) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(s + j, load(s + j) * factor);
  for (; j < count; ++j) s[j] *= factor;
}

void add_multiple(float* sums, const float* values, int64_t count, float factor) {
  const Vec times = splat(factor);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    store(sums + j, multiply_add(load(values + j), times, load(sums + j)));
  if (j == count) return;
  const Vec last = load_part(sums + j, count - j, 0);
  store_part(sums + j, multiply_add(load_part(values + j, count - j, 0), times, last), count - j);
}

void add_wide(double* sums, const float* values, int64_t count, double factor) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    *reinterpret_cast<UnalignedDoubleVec*>(sums + j) +=
        __builtin_convertvector(load(values + j), DoubleVec) * factor;
  for (; j < count; ++j) sums[j] += static_cast<double>(values[j]) * factor;
}

void add_narrow(float* sums, const double* factors, int64_t count, double constant) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const DoubleVec product = *reinterpret_cast<const UnalignedDoubleVec*>(factors + j) * constant;
    store(sums + j, load(sums + j) + __builtin_convertvector(product, Vec));
  }
  for (; j < count; ++j) sums[j] += static_cast<float>(factors[j] * constant);
}

void widen(const uint16_t* values, int64_t count, float* out) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(out + j, load_bf16(values + j));
  for (; j < count; ++j) {
    const uint32_t bits = static_cast<uint32_t>(values[j]) << 16;
    __builtin_memcpy(out + j, &bits, sizeof bits);
  }
}

inline bool any(IntVec condition) {
#if defined(__AVX512F__)
  const __m512i bits = reinterpret_cast<__m512i>(condition);
  return _mm512_test_epi32_mask(bits, bits) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(condition)) != 0;
#else
  int32_t all = 0;
  for (int64_t l = 0; l < kLanes; ++l) all |= condition[l];
  return all != 0;
#endif
}

// To the nearest bfloat16, ties to even.
inline Vec round_bf16(Vec v) {
  const UintVec bits = reinterpret_cast<UintVec>(v);
  return reinterpret_cast<Vec>((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}

void set_apart(float* s, int64_t rows, int64_t cols, const float* row_limit, const float* col_limit,
               double* row_lost, float* col_lost,
               void (*found)(void* to, int64_t row, int64_t col, float value), void* to) {
  for (int64_t i = 0; i < rows; ++i) {
    float* p = s + i * cols;
    Vec total = {};
    for (int64_t j = 0; j < cols; j += kLanes) {
      const int64_t count = cols - j < kLanes ? cols - j : kLanes;
      const Vec v = load_up_to(p + j, count);
      const Vec size = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(v) & 0x7FFFFFFF);
      const IntVec large = size > row_limit[i] + load_up_to(col_limit + j, count);
      if (any(large)) {
        for (int64_t l = 0; l < count; ++l) {
          if (large[l] == 0) continue;
          found(to, i, j + l, v[l]);
          p[j + l] = 0;
        }
      }
      const Vec kept = large ? Vec{} : v;
      const Vec lost = kept - round_bf16(kept);
      total += lost;
      if (count == kLanes)
        store(col_lost + j, load(col_lost + j) + lost);
      else
        store_part(col_lost + j, load_part(col_lost + j, count, 0) + lost, count);
    }
    row_lost[i] += reduce_add(total);
  }
}

#include "distill_kernels_impl.h"

}  // namespace

#define M3BIND_JOIN_(a, b) a##b
#define M3BIND_JOIN(a, b) M3BIND_JOIN_(a, b)

const RowKernels& M3BIND_JOIN(row_kernels_, M3BIND_NAME)() {
  static constexpr RowKernels kernels = {
      sum_shifted,
      maxima,
      sum_own_shift,
      gradient_shifted,
      gradient_own_shift,
      row_dots,
      multiply,
      add_multiple,
      add_wide,
      add_narrow,
      widen,
      affine,
      softplus_sum,
      sigmoid,
      set_apart,
      {sum_dual_shifted, sum_dual_own_shift, gradient_dual_shifted, gradient_dual_own_shift}};
  return kernels;
}

}  // namespace m3bind::cpu
