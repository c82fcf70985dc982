#include "tiling.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "row_blocks.h"

namespace m3bind::cpu {
namespace {

using torch::headeronly::ScalarType;

// Of fewer derivatives the rounding to bfloat16 does not average out, and there is no time to win.
constexpr int64_t kFewPairs = 128 * 128;
constexpr double kLargestLog2Sum = 126.0;  // float32 overflows at 128
// Beyond it float32 rounds a shift by 64 and more, and 2^(logit - shift) would overflow.
constexpr double kLargestShift = 1L << 30;

bool narrow_products(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1),
                  "x and y must be matrices of the same number of features");
  return x.scalar_type() == ScalarType::BFloat16 && y.scalar_type() == ScalarType::BFloat16 &&
         x.size(0) * y.size(0) >= kFewPairs && bf16_products_available();
}

// Few columns are some tiles all the same, for threads to share.
int64_t tile_cols(int64_t cols) {
  constexpr int64_t kFew = 512;
  const int64_t width = cols <= kFew ? 64 : blocked_products_available() ? 128 : 256;
  return std::max(int64_t{1}, std::min(cols, width));
}

int64_t tiles_at_once(AtOnce at_once, int64_t tiles) {
  const int64_t threads = torch::stable::get_num_threads();
  return at_once == AtOnce::kRows ? tiles : std::min(tiles, threads);
}

std::unique_ptr<Products> products_of(const Tensor& x, const Tensor& y, int64_t width) {
  if (x.scalar_type() == ScalarType::BFloat16) return bf16_products(x, y, width);
  if (blocked_products_available() && x.size(1) > 0) return blocked_products(x, y, width);
  return float_products(x, y);
}

// Contiguous, and in float32 unless `narrow`: what that takes is in `space`.
Tensor prepared(const Tensor& t, bool narrow, Space<float>& space) {
  if (narrow || t.scalar_type() == ScalarType::Float) return torch::stable::contiguous(t);
  space.resize(t.numel());
  Tensor wide = torch::stable::from_blob(space.data(), {t.size(0), t.size(1)}, {t.size(1), 1},
                                         t.device(), ScalarType::Float);
  return torch::stable::copy_(wide, t);
}

double largest_norm(const FloatRows& t) {
  std::vector<double> squares(t.rows());
  for_row_blocks(t.rows(), [&](int64_t begin, int64_t end) {
    t.for_rows(begin, end, [&](int64_t i, const float* row) {
      row_kernels().row_dots(row, row, 1, t.features(), squares.data() + i);
    });
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

Tiling::Tiling(const Tensor& x, const Tensor& y, const Tensor& logit_scale, PairRules rules,
               double margin, AtOnce at_once)
    : Tiling(x, y, read_scalar(logit_scale), std::move(rules), margin, at_once) {
  choose_factor();
}

Tiling::Tiling(const Tensor& x, const Tensor& y, double scale, PairRules rules, double margin,
               AtOnce at_once)
    : Tiling(x, y, scale, std::move(rules), margin, at_once, narrow_products(x, y)) {}

Tiling::Tiling(const Tensor& x, const Tensor& y, double scale, PairRules rules, double margin,
               AtOnce at_once, bool narrow)
    : x_(prepared(x, narrow, wide_x_)),
      y_(prepared(y, narrow, wide_y_)),
      rules_(std::move(rules)),
      rows_(x_.rows()),
      cols_(y_.rows()),
      width_(tile_cols(cols_)),
      slots_(tiles_at_once(at_once, (cols_ + width_ - 1) / width_)),
      scale_(scale),
      margin_(margin) {
  products_ = products_of(x_.tensor(), y_.tensor(), width_);
  rules_.check(rows_, cols_);
  log2_longest_ = std::log2(static_cast<double>(std::max({rows_, cols_, int64_t{1}})));
}

void Tiling::choose_factor() {
  const double dot = largest_norm(x_) * largest_norm(y_) + std::abs(margin_);
  to_log2_logit_ = std::abs(scale_) * kLog2E;
  largest_log2_logit_ = to_log2_logit_ * dot;
  // A left-out pair is -inf in the tile and must stay -inf as a logit, so both parts of the factor
  // must be positive: the tile takes the sign.
  unit_ = scale_ < 0 ? -1.0 : 1.0;
  const float rounded = static_cast<float>(to_log2_logit_);
  if (largest_log2_logit_ > kLargestShift && std::isfinite(rounded)) {
    // The tile takes the scale, too. With these parts of 1 a value less itself is 0.
    unit_ *= rounded;
    to_log2_logit_ = 1;
    factor_ = {1 - 0x1p-24f, 0x1p-24f};
    return;
  }
  if (dot > 0x1p66) {  // and of features that large, their size
    unit_ *= 0x1p-66;
    to_log2_logit_ *= 0x1p66;
  }
  constexpr double kNextToNothing = 1e-30;  // for a scale of 0
  const double factor = std::max(to_log2_logit_, kNextToNothing);
  factor_.high = static_cast<float>(factor);
  if (factor_.high >= factor) factor_.high = std::nextafter(factor_.high, 0.0f);
  factor_.low = static_cast<float>(factor - factor_.high);
}

float Tiling::common_shift() const {
  return static_cast<float>(
      std::ceil(std::max(0.0, largest_log2_logit_ + log2_longest_ - kLargestLog2Sum)));
}

double Tiling::smallest_log2_sum() const { return log2_longest_ - 126.0 + 24.0; }

void Tiling::keep_in(const Tensor& kept) {
  STD_TORCH_CHECK(kept.dim() == 2 && kept.size(0) <= rows_ && kept.size(1) == cols_ &&
                      kept.scalar_type() == ScalarType::Float && kept.is_contiguous(),
                  "kept dot products must be float32 rows of the matrix");
  kept_ = kept;
  kept_data_ = static_cast<float*>(kept_->mutable_data_ptr());
  kept_rows_ = kept.size(0);
}

void Tiling::take_from(const Tensor& kept) {
  keep_in(torch::stable::contiguous(kept));
  filled_ = true;
}

std::span<Tile> Tiling::lay_out(const Range& range) {
  const bool kept = range.row < kept_rows_, in_kept = kept && !filled_;
  if (range.col == 0) products_->begin_rows(range.row, range.rows, !kept || in_kept);
  if (!in_kept) memory_.resize(slots_ * std::min(rows_, kTileRows) * width_);
  tiles_.resize(slots_);
  to_put_back_.resize(slots_);
  int64_t count = 0;
  for (int64_t col = range.col; col < range.col + range.cols; col += width_, ++count) {
    Tile& tile = tiles_[count];
    static_cast<Range&>(tile) = {range.row, range.rows, col, std::min(width_, cols_ - col)};
    tile.slot = count;
    tile.data = in_kept ? kept_data_ + range.row * cols_ + range.rows * col
                        : memory_.data() + count * std::min(rows_, kTileRows) * width_;
  }
  return {tiles_.data(), static_cast<size_t>(count)};
}

void Tiling::dots(const Tile& tile) {
  const int64_t size = tile.rows * tile.cols;
  const bool kept = tile.row < kept_rows_;
  if (kept && filled_) {
    std::copy_n(kept_data_ + tile.row * cols_ + tile.rows * tile.col, size, tile.data);
    return;
  }
  if (kept) populate(tile.data, size * sizeof(float));
  products_->dots(tile);
  if (unit_ != 1) row_kernels().multiply(tile.data, size, static_cast<float>(unit_));
  if (!kept) return;
  const auto remember = [&](int64_t i, int64_t j) {
    to_put_back_[tile.slot].emplace_back(&tile.at(i, j), tile.at(i, j));
  };
  rules_.for_each_masked(tile, remember);
  rules_.for_each_positive(tile, remember);
}

void Tiling::put_back() {
  for (auto& overwritten : to_put_back_) {
    for (const auto& [to, value] : overwritten) *to = value;
    overwritten.clear();
  }
}

}  // namespace m3bind::cpu
