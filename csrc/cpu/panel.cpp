#include "panel.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace m3bind::cpu {
namespace {

using torch::headeronly::ScalarType;

// Enough rows for a GEMM at full speed, and few enough for the panel to stay near the cache.
constexpr int64_t kPanelElements = int64_t{1} << 22;
constexpr int64_t kMinPanelRows = 512;
constexpr int64_t kMaxPanelRows = 1024;
constexpr double kSmallestFactor = 1e-30;
constexpr double kLargestLog2Sum = 126.0;  // float32 overflows at 128

double read_scalar(const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1, "logit_scale must have one element");
  const Tensor wide = torch::stable::to(t, ScalarType::Double);
  return *static_cast<const double*>(wide.const_data_ptr());
}

Tensor as_float_rows(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, "features must be matrices");
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
}

double largest_norm(const Tensor& t) {
  const int64_t rows = t.size(0), cols = t.size(1);
  const float* data = static_cast<const float*>(t.const_data_ptr());
  std::vector<double> squares(rows);
  for_row_blocks(rows, [&](int64_t begin, int64_t end) {
    row_kernels().row_dots(data + begin * cols, data + begin * cols, end - begin, cols,
                           squares.data() + begin);
  });
  double largest = 0;
  for (const double square : squares) {
    if (!(square <= largest)) largest = square;  // NaN goes in, and stays
    if (std::isnan(largest)) break;
  }
  return std::sqrt(largest);
}

}  // namespace

Exclusions::Exclusions(const std::optional<Tensor>& row_ids, const std::optional<Tensor>& col_ids) {
  STD_TORCH_CHECK(row_ids.has_value() == col_ids.has_value(), "row_ids and col_ids go together");
  if (!row_ids) return;
  STD_TORCH_CHECK(
      row_ids->scalar_type() == ScalarType::Long && col_ids->scalar_type() == ScalarType::Long,
      "ids must be int64");
  row_ids_ = torch::stable::contiguous(*row_ids);
  const Tensor ids = torch::stable::contiguous(*col_ids);
  const int64_t* data = static_cast<const int64_t*>(ids.const_data_ptr());
  columns_.reserve(ids.numel());
  for (int64_t j = 0; j < ids.numel(); ++j) columns_.emplace_back(data[j], j);
  if (!std::is_sorted(columns_.begin(), columns_.end()))
    std::sort(columns_.begin(), columns_.end());
}

void Exclusions::apply(float* s, int64_t ld, int64_t first, int64_t rows) const {
  if (!row_ids_) return;
  const int64_t* ids = static_cast<const int64_t*>(row_ids_->const_data_ptr()) + first;
  for (int64_t i = 0; i < rows; ++i) {
    auto found =
        std::lower_bound(columns_.begin(), columns_.end(), std::pair<int64_t, int64_t>(ids[i], 0));
    for (; found != columns_.end() && found->first == ids[i]; ++found)
      s[i * ld + found->second] = -std::numeric_limits<float>::infinity();
  }
}

Panels::Panels(const Tensor& x, const Tensor& y, const Tensor& logit_scale,
               const std::optional<Tensor>& row_ids, const std::optional<Tensor>& col_ids)
    : x_(as_float_rows(x)),
      y_(as_float_rows(y)),
      y_transposed_(torch::stable::transpose(y_, 0, 1)),
      exclusions_(row_ids, col_ids),
      rows_(x_.size(0)),
      cols_(y_.size(0)),
      scale_(read_scalar(logit_scale)) {
  STD_TORCH_CHECK(x_.size(1) == y_.size(1), "x and y must have the same number of features");
  STD_TORCH_CHECK(!row_ids || (row_ids->numel() == rows_ && (*col_ids).numel() == cols_),
                  "one id for each row");
  log2_longest_ = std::log2(static_cast<double>(std::max({rows_, cols_, int64_t{1}})));
  const int64_t wanted = kPanelElements / std::max<int64_t>(1, cols_);
  step_ = std::min(rows_, std::clamp(wanted, kMinPanelRows, kMaxPanelRows));
  // A left-out pair is -inf in the panel and must stay -inf as a logit, so both parts of the factor
  // must be positive. A scale that is not, or that is next to nothing, is multiplied into the
  // panel.
  scale_in_panel_ = !(scale_ > kSmallestFactor);
  const double factor = (scale_in_panel_ ? 1.0 : scale_) * kLog2E;
  factor_.high = static_cast<float>(factor);
  if (factor_.high >= factor) factor_.high = std::nextafter(factor_.high, 0.0f);
  factor_.low = static_cast<float>(factor - factor_.high);
  buffer_ = torch::stable::new_empty(x_, {step_, cols_});
  data_ = static_cast<float*>(buffer_.mutable_data_ptr());
}

float Panels::common_shift() const {
  const double bound = std::abs(scale_) * largest_norm(x_) * largest_norm(y_) * kLog2E;
  return static_cast<float>(std::ceil(std::max(0.0, bound + log2_longest_ - kLargestLog2Sum)));
}

double Panels::smallest_log2_sum() const { return log2_longest_ - 126.0 + 24.0; }

Tensor Panels::part(const Tensor& t, int64_t first, int64_t count) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, first, count);
}

void Panels::compute(int64_t first, int64_t count) {
  mm_out(tensor(count), part(x_, first, count), y_transposed_);
  if (scale_in_panel_) {
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      row_kernels().multiply(data_ + begin * cols_, (end - begin) * cols_,
                             static_cast<float>(scale_));
    });
  }
  exclusions_.apply(data_, cols_, first, count);
}

}  // namespace m3bind::cpu
