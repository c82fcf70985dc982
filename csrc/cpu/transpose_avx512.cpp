#include <immintrin.h>

#include "transpose.h"

namespace m3bind::cpu {
namespace {

constexpr int64_t kLanes = 16;

__mmask16 first(int64_t count) {
  return count >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1);
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

}  // namespace m3bind::cpu
