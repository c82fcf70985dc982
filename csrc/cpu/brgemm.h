// Products of blocks that fit into the second-level cache, by torch (oneDNN). It exports these
// functions, under the same names in 2.11 to 2.15, though not as part of its stable ABI: where a
// later one does not, they are null.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tile.h"

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

namespace m3bind::cpu {

// f(first, count) on every part of `size`, in order.
template <class F>
void over_parts(int64_t begin, int64_t end, int64_t size, const F& f) {
  for (int64_t first = begin; first < end; first += size) f(first, std::min(size, end - first));
}

// The same on the rows of a product. Torch keeps the code of every combination of sizes that it has
// met: so no operand or result has the matrix' number of columns from row to row, and where there
// are fewer rows than those of a whole tile, a block has kBlockRows.
template <class F>
void over_row_blocks(int64_t begin, int64_t end, const F& f) {
  over_parts(begin, end, end - begin < kTileRows ? kBlockRows : kTileRows, f);
}

}  // namespace m3bind::cpu
