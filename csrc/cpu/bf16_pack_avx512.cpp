#include <immintrin.h>

#include "bf16_pack.h"

namespace m3bind::cpu {
namespace {

constexpr int64_t kLanes = 16;

__mmask16 first(int64_t count) {
  return count >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1);
}

// From all first halves and all second ones to pairs.
__m512i interleave(__m512i halves) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}

// Turns a square: by 32-bit elements within quarters, by pairs of elements, then whole quarters.
inline void turn(__m512i (&rows)[kLanes]) {
  __m512i t[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  __m512i u[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    const __m512i even_low = _mm512_shuffle_i32x4(u[i], u[4 + i], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(u[i], u[4 + i], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    rows[4 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    rows[12 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

}  // namespace

void interleave(const Bf16* row0, const Bf16* row1, int64_t count, uint32_t* pairs) {
  for (int64_t d = 0; d < count; d += kLanes) {
    const __mmask16 some = first(count - d);
    const __m256i low = _mm256_maskz_loadu_epi16(some, row0 + d);
    const __m256i high =
        row1 == nullptr ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(some, row1 + d);
    const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    _mm512_mask_storeu_epi32(pairs + d, some, interleave(halves));
  }
}

void transpose(const uint32_t* from, int64_t from_ld, int64_t rows, int64_t cols, uint32_t* to,
               int64_t to_ld) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int64_t height = rows - i < kLanes ? rows - i : kLanes;
    for (int64_t j = 0; j < cols; j += kLanes) {
      const int64_t width = cols - j < kLanes ? cols - j : kLanes;
      const uint32_t* corner = from + i * from_ld + j;
      __m512i square[kLanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r)
        square[r] = _mm512_maskz_loadu_epi32(r < height ? first(width) : 0, corner + r * from_ld);
      turn(square);
#pragma GCC unroll 16
      for (int64_t c = 0; c < kLanes; ++c)
        _mm512_mask_storeu_epi32(to + (j + c) * to_ld + i, c < width ? first(height) : 0,
                                 square[c]);
    }
  }
}

void round_pair(const float* from0, const float* from1, int64_t count, Bf16* row0, Bf16* row1,
                Bf16* pair) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const __mmask16 some = first(count - j);
    const __m512 a = _mm512_maskz_loadu_ps(some, from0 + j);
    const __m512 b =
        from1 == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(some, from1 + j);
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
    _mm256_mask_storeu_epi16(row0 + j, some, _mm512_castsi512_si256(both));
    if (row1 != nullptr)
      _mm256_mask_storeu_epi16(row1 + j, some, _mm512_extracti64x4_epi64(both, 1));
    _mm512_mask_storeu_epi32(pair + 2 * j, some, interleave(both));
  }
}

}  // namespace m3bind::cpu
