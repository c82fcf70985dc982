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
