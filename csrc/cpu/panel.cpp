#include "panel.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace m3bind::cpu {
namespace {

using torch::headeronly::ScalarType;

// Enough rows for a GEMM at full speed, and few enough for the panel to stay near the cache.
constexpr int64_t kPanelElements = int64_t{1} << 22;
constexpr int64_t kMinPanelRows = 512;
constexpr int64_t kMaxPanelRows = 1024;
// Of fewer derivatives the rounding to bfloat16 does not average out, and there is no time to win.
constexpr int64_t kFewPairs = 128 * 128;
constexpr double kSmallestFactor = 1e-30;
constexpr double kLargestLog2Sum = 126.0;  // float32 overflows at 128

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

double read_scalar(const Tensor& t) {
  STD_TORCH_CHECK(t.numel() == 1, "a scale or bias must have one element");
  if (t.scalar_type() == ScalarType::Float) return *static_cast<const float*>(t.const_data_ptr());
  const Tensor wide = torch::stable::to(t, ScalarType::Double);
  return *static_cast<const double*>(wide.const_data_ptr());
}

Panels::Panels(const Tensor& x, const Tensor& y, const Tensor& logit_scale, PairRules rules,
               double margin)
    : Panels(x, y, read_scalar(logit_scale), std::move(rules), margin) {}

Panels::Panels(const Tensor& x, const Tensor& y, double scale, PairRules rules, double margin)
    : x_(as_float_rows(x)),
      y_(as_float_rows(y)),
      rules_(std::move(rules)),
      rows_(x_.size(0)),
      cols_(y_.size(0)),
      scale_(scale),
      margin_(margin) {
  STD_TORCH_CHECK(x_.size(1) == y_.size(1), "x and y must have the same number of features");
  rules_.check(rows_, cols_);
  log2_longest_ = std::log2(static_cast<double>(std::max({rows_, cols_, int64_t{1}})));
  const int64_t wanted = kPanelElements / std::max<int64_t>(1, cols_);
  step_ = std::min(rows_, std::clamp(wanted, kMinPanelRows, kMaxPanelRows));
  // A left-out pair is -inf in the panel and must stay -inf as a logit, so both parts of the factor
  // must be positive: the panel takes the sign, and a scale of 0 is next to nothing.
  sign_ = scale_ < 0 ? -1.0 : 1.0;
  const double magnitude = std::abs(scale_);
  const double factor = (magnitude < kSmallestFactor ? kSmallestFactor : magnitude) * kLog2E;
  factor_.high = static_cast<float>(factor);
  if (factor_.high >= factor) factor_.high = std::nextafter(factor_.high, 0.0f);
  factor_.low = static_cast<float>(factor - factor_.high);
  const bool narrow = x.scalar_type() == ScalarType::BFloat16 &&
                      y.scalar_type() == ScalarType::BFloat16 && rows_ * cols_ >= kFewPairs;
  products_ = narrow && bf16_products_available()
                  ? bf16_products(torch::stable::contiguous(x), torch::stable::contiguous(y))
                  : float_products(x_, y_);
}

float Panels::common_shift() const {
  const double largest = largest_norm(x_) * largest_norm(y_) + std::abs(margin_);
  const double bound = std::abs(scale_) * largest * kLog2E;
  return static_cast<float>(std::ceil(std::max(0.0, bound + log2_longest_ - kLargestLog2Sum)));
}

double Panels::smallest_log2_sum() const { return log2_longest_ - 126.0 + 24.0; }

void Panels::keep_in(const Tensor& kept) {
  STD_TORCH_CHECK(kept.dim() == 2 && kept.size(0) <= rows_ && kept.size(1) == cols_ &&
                      kept.scalar_type() == ScalarType::Float && kept.is_contiguous(),
                  "kept dot products must be float32 rows of the matrix");
  kept_ = kept;
  kept_rows_ = kept.size(0);
}

void Panels::take_from(const Tensor& kept) {
  keep_in(torch::stable::contiguous(kept));
  filled_ = true;
}

void Panels::use(const Tensor& memory, int64_t first, int64_t count) {
  panel_ = rows_of(memory, first, count);
  data_ = static_cast<float*>(panel_.mutable_data_ptr());
}

void Panels::dots(int64_t first, int64_t count) {
  const bool kept = first < kept_rows_;
  if (kept && !filled_) {
    use(*kept_, first, count);
  } else {
    if (!buffer_) buffer_ = torch::stable::new_empty(x_, {step_, cols_});
    use(*buffer_, 0, count);
  }
  if (kept && filled_) {
    const float* from = static_cast<const float*>(kept_->const_data_ptr()) + first * cols_;
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      std::copy(from + begin * cols_, from + end * cols_, data_ + begin * cols_);
    });
    return;
  }
  products_->dots(first, count, panel_);
  if (sign_ < 0) {
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      row_kernels().multiply(data_ + begin * cols_, (end - begin) * cols_, -1.0f);
    });
  }
  if (!kept) return;
  const auto remember = [&](int64_t i, int64_t j) {
    float* value = data_ + (i - first) * cols_ + j;
    to_put_back_.emplace_back(value, *value);
  };
  rules_.for_each_masked(first, count, remember);
  rules_.for_each_positive(first, count, remember);
}

void Panels::put_back() {
  for (const auto& [to, value] : to_put_back_) *to = value;
  to_put_back_.clear();
}

void add_apart(const Panels& panels, const std::vector<Apart>& apart, const Tensor& grad_x,
               const Tensor& grad_y) {
  const int64_t features = panels.x().size(1);
  const auto add = [&](const Tensor& to, int64_t i, const Tensor& from, int64_t j, float grad) {
    if (to.size(0) == 0) return;
    float* out = static_cast<float*>(to.mutable_data_ptr()) + i * features;
    const float* in = static_cast<const float*>(from.const_data_ptr()) + j * features;
    for (int64_t d = 0; d < features; ++d) out[d] += grad * in[d];
  };
  for (const Apart& a : apart) {
    add(grad_x, a.row, panels.y(), a.col, a.grad);
    add(grad_y, a.col, panels.x(), a.row, a.grad);
  }
}

}  // namespace m3bind::cpu
