// The one source of the score kernels, compiled once an instruction set (see CMakeLists.txt). As in
// row_kernels_impl.h, no standard header with functions.
#include <cstdint>

#include "score_kernels.h"
#include "vec.h"

namespace m3bind::cpu {
namespace {

// As many accumulators as leave registers for two vectors of columns and one query.
constexpr int kQueries = kLanes == 16 ? kMostQueries : 6;
constexpr int64_t kColumns = 2 * kLanes;
static_assert(kColumns <= 32);

// Features whose products are added in one chain, as in a library GEMM: the chain's rounding grows
// with its length.
constexpr int64_t kChain = 256;

template <int kCount>
void multiply(const float* a, const float* b, int64_t features, float* out) {
  for (int64_t start = 0; start < features; start += kChain) {
    const int64_t end = features - start < kChain ? features : start + kChain;
    Vec sums[kCount][2] = {};
    for (int64_t d = start; d < end; ++d) {
      const Vec first = load(b + d * kColumns), second = load(b + d * kColumns + kLanes);
#pragma GCC unroll 14
      for (int i = 0; i < kCount; ++i) {
        const Vec query = splat(a[d * kQueries + i]);
        sums[i][0] = multiply_add(query, first, sums[i][0]);
        sums[i][1] = multiply_add(query, second, sums[i][1]);
      }
    }
#pragma GCC unroll 14
    for (int i = 0; i < kCount; ++i) {
      float* at = out + i * kColumns;
      store(at, start == 0 ? sums[i][0] : load(at) + sums[i][0]);
      store(at + kLanes, start == 0 ? sums[i][1] : load(at + kLanes) + sums[i][1]);
    }
  }
}

template <int kCount>
void multiply_some(const float* a, const float* b, int64_t features, int64_t count, float* out) {
  if (count == kCount) return multiply<kCount>(a, b, features, out);
  if constexpr (kCount > 1) multiply_some<kCount - 1>(a, b, features, count, out);
}

void scores(const float* a, const float* b, int64_t features, int64_t count, float* out) {
  multiply_some<kQueries>(a, b, features, count, out);
}

inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__AVX512F__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

float one(const float* a, const float* b, int64_t features) {
  float total = 0;
  int64_t start = 0;
  // Two chains at once: each waits for its own sums.
  for (; start + 2 * kChain <= features; start += 2 * kChain) {
    float first = 0, second = 0;
    for (int64_t d = start; d < start + kChain; ++d) {
      first = fma(a[d * kQueries], b[d], first);
      second = fma(a[(d + kChain) * kQueries], b[d + kChain], second);
    }
    total = start == 0 ? first : total + first;
    total += second;
  }
  for (; start < features; start += kChain) {
    const int64_t end = features - start < kChain ? features : start + kChain;
    float sum = 0;
    for (int64_t d = start; d < end; ++d) sum = fma(a[d * kQueries], b[d], sum);
    total = start == 0 ? sum : total + sum;
  }
  return total;
}

void above(const float* scores, int64_t count, const float* limits, uint32_t* bits) {
  for (int64_t i = 0; i < count; ++i, scores += kColumns) {
    const Vec limit = splat(limits[i]);
    bits[i] = not_at_most(load(scores), limit) | not_at_most(load(scores + kLanes), limit)
                                                     << kLanes;
  }
}

void equal(const float* scores, int64_t count, const float* limits, uint32_t* bits) {
  for (int64_t i = 0; i < count; ++i, scores += kColumns) {
    const Vec limit = splat(limits[i]);
    bits[i] = equal(load(scores), limit) | equal(load(scores + kLanes), limit) << kLanes;
  }
}

}  // namespace

#define M3BIND_JOIN_(a, b) a##b
#define M3BIND_JOIN(a, b) M3BIND_JOIN_(a, b)

const ScoreKernels& M3BIND_JOIN(score_kernels_, M3BIND_NAME)() {
  static constexpr ScoreKernels kernels = {kQueries, kColumns, scores, one, above, equal};
  return kernels;
}

}  // namespace m3bind::cpu
