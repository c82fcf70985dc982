#include "pair_rules.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

namespace m3bind::cpu {

using torch::headeronly::ScalarType;

EqualPairs::EqualPairs(const std::optional<Tensor>& rows, const std::optional<Tensor>& cols) {
  STD_TORCH_CHECK(rows.has_value() == cols.has_value(), "rows and columns go together");
  if (!rows) return;
  STD_TORCH_CHECK(rows->scalar_type() == ScalarType::Int && cols->scalar_type() == ScalarType::Int,
                  "classes and masks must be int32");
  rows_ = torch::stable::contiguous(*rows);
  cols_ = torch::stable::contiguous(*cols);
  row_data_ = static_cast<const int32_t*>(rows_->const_data_ptr());
  col_data_ = static_cast<const int32_t*>(cols_->const_data_ptr());
  std::vector<std::pair<int32_t, int64_t>> sorted;  // (number, column)
  sorted.reserve(cols_->numel());
  for (int64_t j = 0; j < cols_->numel(); ++j) sorted.emplace_back(col_data_[j], j);
  if (!std::is_sorted(sorted.begin(), sorted.end())) std::sort(sorted.begin(), sorted.end());
  columns_.reserve(sorted.size());
  for (const auto& [number, column] : sorted) columns_.push_back(column);
  equal_columns_.reserve(rows_->numel());
  for (int64_t i = 0; i < rows_->numel(); ++i) {
    const auto first =
        std::lower_bound(sorted.begin(), sorted.end(), std::pair(row_data_[i], int64_t{0}));
    const auto last = std::lower_bound(
        first, sorted.end(), std::pair(row_data_[i], std::numeric_limits<int64_t>::max()));
    equal_columns_.emplace_back(first - sorted.begin(), last - sorted.begin());
  }
}

void PairRules::check(int64_t rows, int64_t cols) const {
  STD_TORCH_CHECK(classes_.fit(rows, cols) && masks_.fit(rows, cols),
                  "one class and one mask for each row and column");
}

}  // namespace m3bind::cpu
