// As in row_kernels_impl.h, no standard header with functions.
#include <immintrin.h>

#include <cstdint>

#include "rounded_kernels.h"
#include "score_kernels.h"

namespace m3bind::cpu {
namespace {

constexpr int kQueries = kMostQueries;
constexpr int64_t kColumns = 32;

template <int kCount>
void multiply(const uint32_t* a, const uint32_t* b, int64_t pairs, float* out) {
  __m512 sums[kCount][2] = {};
  for (int64_t p = 0; p < pairs; ++p) {
    const __m512bh first = (__m512bh)_mm512_loadu_si512(b + p * kColumns);
    const __m512bh second = (__m512bh)_mm512_loadu_si512(b + p * kColumns + 16);
#pragma GCC unroll 14
    for (int i = 0; i < kCount; ++i) {
      const __m512bh query = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[p * kQueries + i]));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], query, first);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], query, second);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kCount; ++i) {
    _mm512_storeu_ps(out + i * kColumns, sums[i][0]);
    _mm512_storeu_ps(out + i * kColumns + 16, sums[i][1]);
  }
}

template <int kCount>
void multiply_some(const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t count, float* out) {
  if (count == kCount) return multiply<kCount>(a, b, pairs, out);
  if constexpr (kCount > 1) multiply_some<kCount - 1>(a, b, pairs, count, out);
}

void scores(const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t count, float* out) {
  multiply_some<kQueries>(a, b, pairs, count, out);
}

__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

void round(const float* row, int64_t features, uint32_t* out, float* norm, float* error) {
  __m512 squares = _mm512_setzero_ps(), errors = _mm512_setzero_ps();
  const auto add = [&](__m512 exact, __m256i half) {
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    const __m512 lost = _mm512_sub_ps(exact, _mm512_castsi512_ps(wide));
    squares = _mm512_fmadd_ps(exact, exact, squares);
    errors = _mm512_fmadd_ps(lost, lost, errors);
  };
  for (int64_t d = 0; d < features; d += 32) {
    const int64_t left = features - d;
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(left), row + d);
    const __m512 high = _mm512_maskz_loadu_ps(first_lanes(left - 16), row + d + 16);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    _mm512_mask_storeu_epi32(out + d / 2, first_lanes((left + 1) / 2), both);
    add(low, _mm512_castsi512_si256(both));
    add(high, _mm512_extracti64x4_epi64(both, 1));
  }
  // More than these sums can be off by, and than the squares that vanish in them.
  const float more = 1.0f + static_cast<float>(features) * 0x1p-22f;
  const float vanished = __builtin_sqrtf(static_cast<float>(features)) * 0x1p-62f;
  *norm = __builtin_sqrtf(_mm512_reduce_add_ps(squares) * more) + vanished;
  *error = __builtin_sqrtf(_mm512_reduce_add_ps(errors) * more) + vanished;
}

}  // namespace

const RoundedKernels& rounded_kernels_avx512bf16() {
  static constexpr RoundedKernels kernels = {round, scores};
  return kernels;
}

}  // namespace m3bind::cpu
