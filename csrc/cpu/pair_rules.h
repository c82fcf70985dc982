// Which pairs of a row and a column are positive, and which are masked: m3bind/ops/stats.py tells
// what classes and masks mean.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "tile.h"

namespace m3bind::cpu {

using torch::stable::Tensor;

inline constexpr int kOneColumn = 1, kOneRow = 2;  // bits of a class

// One number a row and a column; calls back on the pairs whose numbers are equal.
class EqualPairs {
 public:
  EqualPairs(const std::optional<Tensor>& rows, const std::optional<Tensor>& cols);
  // Row i and column i are equal, and have both bits of a class.
  explicit EqualPairs(int64_t diagonal) : diagonal_(diagonal) {}

  bool any() const { return rows_.has_value() || diagonal_ > 0; }
  bool fit(int64_t rows, int64_t cols) const {
    if (diagonal_ > 0) return diagonal_ == rows && rows <= cols;
    return !any() || (rows_->numel() == rows && cols_->numel() == cols);
  }
  int bits(int64_t row) const {
    constexpr int kBoth = kOneColumn | kOneRow;
    return diagonal_ > 0 ? kBoth : row_data_[row] & kBoth;
  }
  bool equal(int64_t row, int64_t col) const {
    return diagonal_ > 0 ? row == col : row_data_[row] == col_data_[col];
  }

  // f(row, column) on those within `range`, row by row.
  template <class F>
  void for_each(const Range& range, const F& f) const {
    const int64_t end = range.row + range.rows, last = range.col + range.cols;
    if (diagonal_ > 0) {
      for (int64_t i = std::max(range.row, range.col); i < std::min(end, last); ++i) f(i, i);
      return;
    }
    if (!any()) return;
    for (int64_t i = range.row; i < end; ++i) {
      auto [found, behind] = equal_columns_[i];
      if (behind - found > kFew)
        found = std::lower_bound(columns_.begin() + found, columns_.begin() + behind, range.col) -
                columns_.begin();
      for (; found < behind && columns_[found] < last; ++found)
        if (columns_[found] >= range.col) f(i, columns_[found]);
    }
  }

 private:
  int64_t diagonal_ = 0;  // pairs
  std::optional<Tensor> rows_, cols_;
  const int32_t* row_data_ = nullptr;
  const int32_t* col_data_ = nullptr;
  static constexpr int64_t kFew = 8;
  std::vector<int64_t> columns_;  // sorted by their numbers, those of one number ascending
  std::vector<std::pair<int64_t, int64_t>> equal_columns_;  // [first, last) of these, of each row
};

class PairRules {
 public:
  PairRules(const std::optional<Tensor>& row_class, const std::optional<Tensor>& col_class,
            const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask)
      : classes_(row_class, col_class), masks_(row_mask, col_mask) {}
  // Row i and column i are each other's only positive.
  explicit PairRules(int64_t diagonal, const std::optional<Tensor>& row_mask = {},
                     const std::optional<Tensor>& col_mask = {})
      : classes_(diagonal), masks_(row_mask, col_mask) {}

  void check(int64_t rows, int64_t cols) const;

  // Lowers the positives of a tile by `margin` and lists them. Those that stay out of a sum, and
  // masked pairs, become -inf; before that, masked(row, column, value) is called on the latter.
  template <class F>
  void apply(Tile& tile, float margin, const F& masked) const {
    for_each_masked(tile, [&](int64_t i, int64_t j) {
      float& value = tile.at(i, j);
      masked(i, j, value);
      value = -std::numeric_limits<float>::infinity();
    });
    tile.positives.clear();
    classes_.for_each(tile, [&](int64_t i, int64_t j) {
      float& value = tile.at(i, j);
      const int bits = classes_.bits(i);
      value -= margin;
      tile.positives.push_back({i, j, bits, value});
      if (bits != 0) value = -std::numeric_limits<float>::infinity();
    });
  }

  // f(row, column) on the positive pairs within `range`.
  template <class F>
  void for_each_positive(const Range& range, const F& f) const {
    classes_.for_each(range, f);
  }
  // Of a row that has positives: whether it has only one, or its columns have only this row.
  bool is_lone(int64_t i) const { return classes_.bits(i) != 0; }

  // f(row, column) on the masked pairs within `range`.
  template <class F>
  void for_each_masked(const Range& range, const F& f) const {
    masks_.for_each(range, [&](int64_t i, int64_t j) {
      if (!classes_.any() || !classes_.equal(i, j)) f(i, j);
    });
  }

 private:
  EqualPairs classes_, masks_;
};

}  // namespace m3bind::cpu
