#include "pair_rules.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

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
  columns_.reserve(cols_->numel());
  for (int64_t j = 0; j < cols_->numel(); ++j) columns_.emplace_back(col_data_[j], j);
  if (!std::is_sorted(columns_.begin(), columns_.end()))
    std::sort(columns_.begin(), columns_.end());
}

void PairRules::check(int64_t rows, int64_t cols) const {
  STD_TORCH_CHECK(classes_.fit(rows, cols) && masks_.fit(rows, cols),
                  "one class and one mask for each row and column");
}

}  // namespace m3bind::cpu
