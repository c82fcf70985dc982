// What the blocks of a panel add to the columns, merged in a fixed order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "row_kernels.h"

namespace m3bind::cpu {

// Column sums of the blocks of one panel, each written by one thread.
class BlockColumns {
 public:
  BlockColumns(int64_t panel_rows, int64_t cols)
      : cols_(cols), values_(((panel_rows + kBlockRows - 1) / kBlockRows) * cols) {}
  float* start(int64_t first_row, float value) {
    float* mine = values_.data() + (first_row / kBlockRows) * cols_;
    std::fill(mine, mine + cols_, value);
    return mine;
  }
  // Calls f(column, values of this column in the order of the blocks, blocks) on every column.
  template <class F>
  void merge(int64_t panel_rows, const F& f) const {
    const int64_t blocks = (panel_rows + kBlockRows - 1) / kBlockRows;
    torch::stable::parallel_for(0, cols_, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t j = begin; j < end; ++j) f(j, values_[b * cols_ + j]);
    });
  }

 private:
  int64_t cols_;
  std::vector<float> values_;
};

}  // namespace m3bind::cpu
