// Rounding and packing of bfloat16 operands. A packed operand [K, N] holds pairs of its rows side
// by side, [K / 2, N, 2]: what the dot-product instructions read. A pair is one 32-bit element.
#pragma once

#include <cstdint>

namespace m3bind::cpu {

using Bf16 = uint16_t;

// Rounds two rows of `count` floats to the nearest bfloat16, into row0, row1 and, packed, pair.
// row1 may be null: then it is zero, and only row0 and pair are written.
void round_pair(const float* from0, const float* from1, int64_t count, Bf16* row0, Bf16* row1,
                Bf16* pair);

// pairs[d] = (row0[d], row1[d]); row1 may be null: then it is zero.
void interleave(const Bf16* row0, const Bf16* row1, int64_t count, uint32_t* pairs);

}  // namespace m3bind::cpu
