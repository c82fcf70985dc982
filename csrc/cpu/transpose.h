#pragma once

#include <cstdint>

namespace m3bind::cpu {

// to [cols, rows] = from [rows, cols] turned; `ld` elements from row to row. AVX-512.
void transpose(const uint32_t* from, int64_t from_ld, int64_t rows, int64_t cols, uint32_t* to,
               int64_t to_ld);

}  // namespace m3bind::cpu
