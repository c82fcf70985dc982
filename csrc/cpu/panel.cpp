#include "panel.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace m3bind::cpu {
namespace {

using torch::headeronly::ScalarType;

// Enough rows for a GEMM at full speed, and few enough for the panel to stay near the cache.
constexpr int64_t kPanelRows = 512;
// Of fewer derivatives the rounding to bfloat16 does not average out, and there is no time to win.
constexpr int64_t kFewPairs = 128 * 128;
constexpr double kSmallestFactor = 1e-30;
constexpr double kLargestLog2Sum = 126.0;  // float32 overflows at 128

bool narrow_products(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1),
                  "x and y must be matrices of the same number of features");
  return x.scalar_type() == ScalarType::BFloat16 && y.scalar_type() == ScalarType::BFloat16 &&
         x.size(0) * y.size(0) >= kFewPairs && bf16_products_available();
}

Tensor prepared(const Tensor& t, bool narrow) {
  return torch::stable::contiguous(narrow ? t : torch::stable::to(t, ScalarType::Float));
}

Tensor matrix_in(Space<float>& memory, int64_t rows, int64_t cols, const Tensor& like) {
  memory.resize(rows * cols);
  return torch::stable::from_blob(memory.data(), {rows, cols}, {cols, 1}, like.device(),
                                  ScalarType::Float);
}

double largest_norm(const FloatRows& t) {
  std::vector<double> squares(t.rows());
  for_row_blocks(t.rows(), [&](int64_t begin, int64_t end) {
    std::vector<float> space;
    const float* rows = t.read(begin, end - begin, space);
    row_kernels().row_dots(rows, rows, end - begin, t.features(), squares.data() + begin);
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
    : Panels(x, y, scale, std::move(rules), margin, narrow_products(x, y)) {}

Panels::Panels(const Tensor& x, const Tensor& y, double scale, PairRules rules, double margin,
               bool narrow)
    : x_(prepared(x, narrow)),
      y_(prepared(y, narrow)),
      products_((narrow ? bf16_products
                 : blocked_products_available() && x_.features() > 0
                     ? blocked_products
                     : float_products)(x_.tensor(), y_.tensor())),
      rules_(std::move(rules)),
      rows_(x_.rows()),
      cols_(y_.rows()),
      scale_(scale),
      margin_(margin) {
  rules_.check(rows_, cols_);
  log2_longest_ = std::log2(static_cast<double>(std::max({rows_, cols_, int64_t{1}})));
  step_ = std::min(rows_, kPanelRows);
  // A left-out pair is -inf in the panel and must stay -inf as a logit, so both parts of the factor
  // must be positive: the panel takes the sign, and a scale of 0 is next to nothing.
  sign_ = scale_ < 0 ? -1.0 : 1.0;
  const double magnitude = std::abs(scale_);
  const double factor = (magnitude < kSmallestFactor ? kSmallestFactor : magnitude) * kLog2E;
  factor_.high = static_cast<float>(factor);
  if (factor_.high >= factor) factor_.high = std::nextafter(factor_.high, 0.0f);
  factor_.low = static_cast<float>(factor - factor_.high);
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
    if (!buffer_) buffer_ = matrix_in(memory_, step_, cols_, x_.tensor());
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

}  // namespace m3bind::cpu
