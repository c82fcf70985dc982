// What torch's threads share beside tiles: blocks of kBlockRows rows, the same for any number of
// threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "row_kernels.h"

namespace m3bind::cpu {

inline int64_t blocks_of(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// f(first row, one past the last row) on every block.
template <class F>
void for_row_blocks(int64_t rows, const F& f) {
  torch::stable::parallel_for(0, blocks_of(rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      f(block * kBlockRows, std::min(rows, (block + 1) * kBlockRows));
  });
}

// f(first row, one past the last row, first column, columns) on all of [rows, cols]: whole blocks,
// and all columns unless there are more threads than blocks.
template <class F>
void for_parts(int64_t rows, int64_t cols, const F& f) {
  const int64_t blocks = blocks_of(rows), threads = torch::stable::get_num_threads();
  const int64_t wanted = blocks == 0 ? 1 : (threads + blocks - 1) / blocks;
  constexpr int64_t kNarrow = 64;
  const int64_t width = std::max<int64_t>(1, (cols / wanted + kNarrow - 1) / kNarrow) * kNarrow;
  const int64_t slices = (cols + width - 1) / width;
  torch::stable::parallel_for(0, blocks * slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin, some = 0; part < end; part += some) {
      const int64_t block = part % blocks, first = part / blocks * width;
      some = std::min(end - part, blocks - block);
      f(block * kBlockRows, std::min(rows, (block + some) * kBlockRows), first,
        std::min(width, cols - first));
    }
  });
}

}  // namespace m3bind::cpu
