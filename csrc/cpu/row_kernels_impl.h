// The one source of the row kernels, compiled once an instruction set (see CMakeLists.txt).
//
// Written in GCC's and Clang's vector extension. It includes no standard header with functions:
// a copy of such code made here with AVX-512 could be the one that the linker keeps for everybody.
// The includer defines M3BIND_LANES and M3BIND_NAME.
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cstdint>

#include "row_kernels.h"

namespace m3bind::cpu {
namespace {

constexpr int64_t kLanes = M3BIND_LANES;
// Columns handled at a time: their sums stay in the first-level cache, and the float partial sums
// of a row stay short.
constexpr int64_t kTile = 2048;
constexpr float kInf = __builtin_inff();

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec splat(float v) { return Vec{} + v; }
inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

inline Vec load_part(const float* p, int64_t count, float fill) {
  Vec v = splat(fill);
  for (int64_t l = 0; l < count; ++l) v[l] = p[l];
  return v;
}
inline void store_part(float* p, Vec v, int64_t count) {
  for (int64_t l = 0; l < count; ++l) p[l] = v[l];
}

// a * b + c, rounded once where the processor can: the compiler alone fuses here and not there, and
// a logit of 100 would be off by 5e-6 where it does not.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline float reduce_add(Vec v) {
  float total = 0;
  for (int64_t l = 0; l < kLanes; ++l) total += v[l];
  return total;
}
inline float reduce_max(Vec v) {
  float m = v[0];
  for (int64_t l = 1; l < kLanes; ++l) m = v[l] > m ? v[l] : m;
  return m;
}

// 2^t to 2e-8 (minimax polynomial of degree 6 on [-1/2, 1/2]); 0 below the normal range, inf above
// it, NaN for NaN.
inline Vec exp2(Vec t) {
  const Vec bounded = t < -126.0f ? splat(-126.0f) : (t > 128.0f ? splat(128.0f) : t);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec whole = (bounded + magic) - magic;
  const Vec f = bounded - whole;
  Vec p = splat(0.0001534581242594868f);
  constexpr float kCoefficients[] = {0.0013399930903688073f, 0.009618489071726799f,
                                     0.05550328642129898f,   0.24022646248340607f,
                                     0.6931471824645996f,    1.0f};
  for (const float c : kCoefficients) p = fma(p, f, splat(c));
  const IntVec bits = (__builtin_convertvector(whole, IntVec) + 127) << 23;
  return t < -126.0f ? Vec{} : p * reinterpret_cast<Vec>(bits);
}

struct VecFactor {
  Vec high, low;
  explicit VecFactor(Factor f) : high(splat(f.high)), low(splat(f.low)) {}
  // In this order what is rounded first is as small as the result.
  Vec minus(Vec s, Vec shift) const { return fma(s, low, fma(s, high, -shift)); }
};

inline int64_t tile_width(int64_t cols, int64_t tile) {
  return cols - tile < kTile ? cols - tile : kTile;
}

// Sums over one tile of kRows rows; `shift_row` and `shift_col` may be the same constant.
template <int kRows, bool kOwnShift>
inline void sum_rows(const float* s, int64_t ld, int64_t width, VecFactor factor,
                     const float* row_shift, Vec common, const float* col_shift, double* row_sum,
                     float* col_sum) {
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
  for (; j + kLanes <= width; j += kLanes) {
    for (int r = 0; r < kRows; ++r) dots[r] = load(s + r * ld + j);
    const Vec own = kOwnShift ? load(col_shift + j) : common;
    store(col_sum + j, load(col_sum + j) + column(dots, own));
  }
  if (j < width) {
    const int64_t count = width - j;
    for (int r = 0; r < kRows; ++r) dots[r] = load_part(s + r * ld + j, count, -kInf);
    const Vec own = kOwnShift ? load_part(col_shift + j, count, 0) : common;
    store_part(col_sum + j, load_part(col_sum + j, count, 0) + column(dots, own), count);
  }
  for (int r = 0; r < kRows; ++r) row_sum[r] += reduce_add(rows[r]);
}

template <bool kOwnShift>
inline void sum_panel(const float* s, int64_t ld, int64_t rows, int64_t cols, Factor factor,
                      const float* row_shift, float common, const float* col_shift, double* row_sum,
                      float* col_sum) {
  const VecFactor vec_factor(factor);
  const Vec vec_common = splat(common);
  for (int64_t tile = 0; tile < cols; tile += kTile) {
    const int64_t width = tile_width(cols, tile);
    const float* own = kOwnShift ? col_shift + tile : nullptr;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
      sum_rows<4, kOwnShift>(s + i * ld + tile, ld, width, vec_factor,
                             kOwnShift ? row_shift + i : nullptr, vec_common, own, row_sum + i,
                             col_sum + tile);
    for (; i < rows; ++i)
      sum_rows<1, kOwnShift>(s + i * ld + tile, ld, width, vec_factor,
                             kOwnShift ? row_shift + i : nullptr, vec_common, own, row_sum + i,
                             col_sum + tile);
  }
}

void sum_shifted(const float* s, int64_t ld, int64_t rows, int64_t cols, Factor factor, float shift,
                 double* row_sum, float* col_sum) {
  sum_panel<false>(s, ld, rows, cols, factor, nullptr, shift, nullptr, row_sum, col_sum);
}

void sum_own_shift(const float* s, int64_t ld, int64_t rows, int64_t cols, Factor factor,
                   const float* row_max, const float* col_max, double* row_sum, float* col_sum) {
  sum_panel<true>(s, ld, rows, cols, factor, row_max, 0, col_max, row_sum, col_sum);
}

void maxima(const float* s, int64_t ld, int64_t rows, int64_t cols, Factor factor, float* row_max,
            float* col_max) {
  const VecFactor vec_factor(factor);
  for (int64_t i = 0; i < rows; ++i) {
    const float* p = s + i * ld;
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

inline Vec load_up_to(const float* p, int64_t count) {
  return count == kLanes ? load(p) : load_part(p, count, 0);
}

// Replaces a row of dot products by derivatives(dots, first column, count); returns the sum of
// derivative * dot. Where a pair is left out the dot is -inf, and counts for nothing.
template <class F>
inline double derive_row(float* p, int64_t cols, const F& derivatives) {
  double total = 0;
  for (int64_t tile = 0; tile < cols; tile += kTile) {
    Vec sum = {};
    const auto derive = [&](Vec dots, int64_t j, int64_t count) {
      const Vec grad = derivatives(dots, j, count);
      sum = fma(grad, dots == -kInf ? Vec{} : dots, sum);
      return grad;
    };
    const int64_t end = tile + tile_width(cols, tile);
    int64_t j = tile;
    for (; j + kLanes <= end; j += kLanes) store(p + j, derive(load(p + j), j, kLanes));
    if (j < end) {
      const int64_t count = end - j;
      store_part(p + j, derive(load_part(p + j, count, -kInf), j, count), count);
    }
    total += reduce_add(sum);
  }
  return total;
}

void gradient_shifted(float* s, int64_t ld, int64_t rows, int64_t cols, Factor factor, float shift,
                      const float* row_weight, const float* col_weight, double* by_dot) {
  const VecFactor vec_factor(factor);
  const Vec common = splat(shift);
  for (int64_t i = 0; i < rows; ++i) {
    const Vec weight = splat(row_weight[i]);
    by_dot[i] = derive_row(s + i * ld, cols, [&](Vec dots, int64_t j, int64_t count) {
      return exp2(vec_factor.minus(dots, common)) * (weight + load_up_to(col_weight + j, count));
    });
  }
}

void gradient_own_shift(float* s, int64_t ld, int64_t rows, int64_t cols, Factor factor,
                        const float* row_shift, const float* row_weight, const float* col_shift,
                        const float* col_weight, double* by_dot) {
  const VecFactor vec_factor(factor);
  for (int64_t i = 0; i < rows; ++i) {
    const Vec lse = splat(row_shift[i]);
    const Vec grad = splat(row_weight[i]);
    by_dot[i] = derive_row(s + i * ld, cols, [&](Vec dots, int64_t j, int64_t count) {
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
    for (; j + kLanes <= cols; j += kLanes) total = fma(load(p + j), load(q + j), total);
    if (j < cols) total += load_part(p + j, cols - j, 0) * load_part(q + j, cols - j, 0);
    out[i] = reduce_add(total);
  }
}

void multiply(float* s, int64_t count, float factor) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(s + j, load(s + j) * factor);
  for (; j < count; ++j) s[j] *= factor;
}

}  // namespace

#define M3BIND_JOIN_(a, b) a##b
#define M3BIND_JOIN(a, b) M3BIND_JOIN_(a, b)

const RowKernels& M3BIND_JOIN(row_kernels_, M3BIND_NAME)() {
  static constexpr RowKernels kernels = {
      sum_shifted, maxima, sum_own_shift, gradient_shifted, gradient_own_shift, row_dots, multiply};
  return kernels;
}

}  // namespace m3bind::cpu
