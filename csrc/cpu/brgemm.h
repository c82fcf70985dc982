// Products of blocks that fit into the second-level cache, by torch (oneDNN). It exports these
// functions, under the same names in 2.11 to 2.15, though not as part of its stable ABI: where a
// later one does not, they are null.
#pragma once

#include <cstdint>

extern "C" {
// c [m, n] = a [m, k] @ b [k, n], or added to c; `ld` elements from row to row.
__attribute__((weak)) void m3bind_brgemm_float(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
    const float* a, const float* b, float* c,
    bool packed) __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb");
// The same of bfloat16, where b holds pairs of its rows side by side, [k / 2, n, 2].
__attribute__((weak)) void m3bind_brgemm_bf16(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const void* a,
    const void* b, float* c,
    bool packed) __asm__("_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb");
// After a thread's last product of packed operands.
__attribute__((weak)) void m3bind_brgemm_release(bool packed) __asm__(
    "_ZN2at6native7cpublas14brgemm_releaseEb");
}
