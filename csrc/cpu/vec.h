// The vector type of one instruction set: included by row kernels, which are compiled once each.
//
// Written in GCC's and Clang's vector extension. It includes no standard header with functions:
// a copy of such code made here with AVX-512 could be the one that the linker keeps for everybody.
// The includer defines M3BIND_LANES.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cstdint>

namespace m3bind::cpu {
namespace {

constexpr int64_t kLanes = M3BIND_LANES;
constexpr float kInf = __builtin_inff();

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

typedef double DoubleVec __attribute__((vector_size(kLanes * 8)));
typedef double UnalignedDoubleVec __attribute__((vector_size(kLanes * 8), aligned(8), may_alias));

// Less zero, not plus: v - 0 is v for every v, so that nothing but a broadcast is left.
inline Vec splat(float v) { return v - Vec{}; }
inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

inline Vec load_part(const float* p, int64_t count, float fill) {
  Vec v = splat(fill);
  for (int64_t l = 0; l < count; ++l) v[l] = p[l];
  return v;
}
inline Vec load_up_to(const float* p, int64_t count) {
  return count == kLanes ? load(p) : load_part(p, count, 0);
}
inline void store_part(float* p, Vec v, int64_t count) {
  for (int64_t l = 0; l < count; ++l) p[l] = v[l];
}

// a * b + c, rounded once (by way of float64, all but once): a logit of 100 would be off by 5e-6
// where its product is rounded. (The compiler alone fuses here and not there.)
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
  for (int64_t l = 0; l < kLanes; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return c;
#else
  const auto wide = [](Vec v) { return __builtin_convertvector(v, DoubleVec); };
  return __builtin_convertvector(wide(a) * wide(b) + wide(c), Vec);
#endif
}

// a * b + c by the fastest way, for sums and polynomials.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX2__) || defined(__FP_FAST_FMAF) || defined(__ARM_FEATURE_FMA)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline float reduce_add(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float total = 0;
  for (int64_t l = 0; l < kLanes; ++l) total += v[l];
  return total;
#endif
}
inline float reduce_max(Vec v) {
  float m = v[0];
  for (int64_t l = 1; l < kLanes; ++l) m = v[l] > m ? v[l] : m;
  return m;
}

// bfloat16 values as float.
inline Vec load_bf16(const uint16_t* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#else
  UintVec bits;
  for (int64_t l = 0; l < kLanes; ++l) bits[l] = static_cast<uint32_t>(p[l]) << 16;
  return reinterpret_cast<Vec>(bits);
#endif
}

// 1.5 * 2^23: adding it to a small number and taking it away rounds to the nearest integer.
constexpr float kRounding = 12582912.0f;

// 2^(whole + f) to 2e-8, for a whole number from -126 to 128 and f from -1/2 to 1/2 (minimax
// polynomial of degree 6).
inline Vec exp2_parts(Vec whole, Vec f) {
  Vec p = splat(0.0001534581242594868f);
  constexpr float kCoefficients[] = {0.0013399930903688073f, 0.009618489071726799f,
                                     0.05550328642129898f,   0.24022646248340607f,
                                     0.6931471824645996f,    1.0f};
  for (const float c : kCoefficients) p = multiply_add(p, f, splat(c));
  const IntVec bits = (__builtin_convertvector(whole, IntVec) + 127) << 23;
  return p * reinterpret_cast<Vec>(bits);
}

// 2^t; 0 below the normal range, inf above it, NaN for NaN.
inline Vec exp2(Vec t) {
  const Vec bounded = t < -126.0f ? splat(-126.0f) : (t > 128.0f ? splat(128.0f) : t);
  const Vec whole = (bounded + kRounding) - kRounding;
  return t < -126.0f ? Vec{} : exp2_parts(whole, bounded - whole);
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
