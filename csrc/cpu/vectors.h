// Vectors of kLanes floats, in GCC's and Clang's vector extension. For files that are compiled once
// an instruction set: M3BIND_LANES is defined before.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cstdint>

namespace m3bind::cpu {
namespace {

constexpr int64_t kLanes = M3BIND_LANES;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// Less zero, not plus: v - 0 is v for every v, so that nothing but a broadcast is left.
inline Vec splat(float v) { return v - Vec{}; }
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

// One bit a lane: not (a <= b), so also where either is NaN.
inline uint32_t not_at_most(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)));
#else
  uint32_t bits = 0;
  for (int64_t l = 0; l < kLanes; ++l) bits |= uint32_t{!(a[l] <= b[l])} << l;
  return bits;
#endif
}

// One bit a lane: a == b.
inline uint32_t equal(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
#else
  uint32_t bits = 0;
  for (int64_t l = 0; l < kLanes; ++l) bits |= uint32_t{a[l] == b[l]} << l;
  return bits;
#endif
}

}  // namespace
}  // namespace m3bind::cpu
