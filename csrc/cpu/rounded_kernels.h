// A first look at scores, in bfloat16: twice as many products a cycle where the processor has
// instructions for it.
#pragma once

#include <cstdint>

namespace m3bind::cpu {

// Tiles of as many queries and columns as those of ScoreKernels. Features travel in pairs, the
// first in the lower half; an odd last one has a zero beside it.
struct RoundedKernels {
  // out[p] = features 2p and 2p + 1 of a row, rounded. *norm and *error are the norms of the row
  // and of what rounding took, or a little more.
  void (*round)(const float* row, int64_t features, uint32_t* out, float* norm, float* error);
  // out[i * 32 + j] = sum over p of both products of a[p * 14 + i] and b[p * 32 + j], in float32.
  void (*scores)(const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t count, float* out);
};

#ifdef M3BIND_X86
const RoundedKernels& rounded_kernels_avx512bf16();
#endif

// Of a score by `scores` and the one by ScoreKernels, the largest difference is
// |x| * |y - y'| + |x - x'| * |y'|, for x' and y' rounded, and this much of |x| * |y| for the
// rounding of both sums, in any order; beside it what the processor flushes to zero.
inline constexpr double rounding_of_sums(int64_t features) {
  return (2.0 * static_cast<double>(features) + 16.0) * 0x1p-24;
}
inline constexpr double flushed_to_zero(int64_t features) {
  return 4.0 * static_cast<double>(features) * 0x1p-126;
}

}  // namespace m3bind::cpu
