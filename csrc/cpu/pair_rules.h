// Which pairs of a row and a column are positive, and which are masked: m3bind/ops/stats.py tells
// what classes and masks mean.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

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

  // f(row, column) for rows [first, first + count), in order.
  template <class F>
  void for_each(int64_t first, int64_t count, const F& f) const {
    if (!any()) return;
    for (int64_t i = first; i < first + count; ++i) {
      if (diagonal_ > 0) {
        f(i, i);
        continue;
      }
      auto found = std::lower_bound(columns_.begin(), columns_.end(),
                                    std::pair<int32_t, int64_t>(row_data_[i], 0));
      for (; found != columns_.end() && found->first == row_data_[i]; ++found) f(i, found->second);
    }
  }

 private:
  int64_t diagonal_ = 0;  // pairs
  std::optional<Tensor> rows_, cols_;
  const int32_t* row_data_ = nullptr;
  const int32_t* col_data_ = nullptr;
  std::vector<std::pair<int32_t, int64_t>> columns_;  // (number, column), sorted
};

// A positive pair of the panel at hand.
struct Positive {
  int64_t row, col;
  int bits;
  float dot;  // as the panel held it, less the margin
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

  // Lowers the positives of the panel of rows [first, first + count) by `margin` and lists them in
  // `positives`. Those that stay out of a sum, and masked pairs, become -inf; before that, masked(
  // row, column, value) is called on the latter.
  template <class F>
  void apply(float* panel, int64_t ld, int64_t first, int64_t count, float margin,
             std::vector<Positive>& positives, const F& masked) const {
    positives.clear();
    masks_.for_each(first, count, [&](int64_t i, int64_t j) {
      if (classes_.any() && classes_.equal(i, j)) return;
      float& value = panel[(i - first) * ld + j];
      masked(i, j, value);
      value = -std::numeric_limits<float>::infinity();
    });
    classes_.for_each(first, count, [&](int64_t i, int64_t j) {
      float& value = panel[(i - first) * ld + j];
      const int bits = classes_.bits(i);
      value -= margin;
      positives.push_back({i, j, bits, value});
      if (bits != 0) value = -std::numeric_limits<float>::infinity();
    });
  }

  // f(row, column) on the positive pairs of these rows.
  template <class F>
  void for_each_positive(int64_t first, int64_t count, const F& f) const {
    classes_.for_each(first, count, f);
  }
  // Of a row that has positives: whether it has only one, or its columns have only this row.
  bool is_lone(int64_t i) const { return classes_.bits(i) != 0; }

  // f(row, column) on the masked pairs of these rows.
  template <class F>
  void for_each_masked(int64_t first, int64_t count, const F& f) const {
    masks_.for_each(first, count, [&](int64_t i, int64_t j) {
      if (!classes_.any() || !classes_.equal(i, j)) f(i, j);
    });
  }

 private:
  EqualPairs classes_, masks_;
};

}  // namespace m3bind::cpu
