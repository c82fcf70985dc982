#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "direction.h"
#include "feature_gradients.h"
#include "rounding_loss.h"
#include "similarity_stats.h"
#include "tiling.h"
#include "whole_tensors.h"

namespace m3bind::cpu {
namespace {

Direction direction(const Tensor& lse, const Tensor& grads) {
  Direction out(read(lse));
  const std::vector<double> all = read(grads);
  const auto count = static_cast<std::ptrdiff_t>(out.lse.size());
  STD_TORCH_CHECK(all.size() == 3 * out.lse.size(), "three upstream gradients for each LSE");
  out.grad.assign(all.begin(), all.begin() + count);
  out.positive.assign(all.begin() + count, all.begin() + 2 * count);
  out.total.assign(all.begin() + 2 * count, all.end());
  return out;
}

// The derivative by every logit of a tile, in place of its dot products.
class Gradient {
 public:
  Gradient(const Tiling& tiling, const Direction& rows, const Direction& cols, bool totals)
      : shift_(tiling.common_shift()),
        rows_(rows),
        cols_(cols),
        totals_(totals),
        by_dot_(tiling.row_totals()),
        apart_(tiling) {
    if (std::isfinite(shift_)) {
      const double smallest = shift_ + tiling.smallest_log2_sum();
      row_weight_ = rows.weights(shift_, smallest);
      col_weight_ = cols.weights(shift_, smallest);
      one_exponential_ =
          row_weight_.size() == rows.lse.size() && col_weight_.size() == cols.lse.size();
    }
    if (one_exponential_) return;
    row_weight_ = rows.own_weights();
    col_weight_ = cols.own_weights();
    row_shift_ = rows.own_shifts();
    col_shift_ = cols.own_shifts();
  }

  // By any thread.
  void apply(Tiling& tiling, Tile& tile) {
    double* by_dot = by_dot_.of(tile);
    tiling.compute(tile, [&](int64_t i, int64_t j, float dot) {
      // A masked pair does not count for the totals, though add_totals takes all pairs alike.
      if (totals_) by_dot[i - tile.row] -= (rows_.total[i] + cols_.total[j]) * dot;
    });
    if (one_exponential_)
      row_kernels().gradient_shifted(tile.data, tile.rows, tile.cols, tiling.factor(), shift_,
                                     row_weight_.data() + tile.row, col_weight_.data() + tile.col,
                                     by_dot);
    else
      row_kernels().gradient_own_shift(tile.data, tile.rows, tile.cols, tiling.factor(),
                                       row_shift_.data() + tile.row, row_weight_.data() + tile.row,
                                       col_shift_.data() + tile.col, col_weight_.data() + tile.col,
                                       by_dot);
    for (const Positive& p : tile.positives) {
      const double logit = tiling.log2_logit(p.dot);
      double grad = rows_.positive[p.row] + cols_.positive[p.col];
      if (p.bits == kOneRow) grad += rows_.weight(p.row, logit);
      if (p.bits == kOneColumn) grad += cols_.weight(p.col, logit);
      float& value = tile.at(p.row, p.col);
      value += static_cast<float>(grad);
      by_dot[p.row - tile.row] += grad * p.dot;
      if (!tiling.products().exact() && p.bits != 0) {
        apart_.of(tile).push_back({p.row, p.col, value});
        value = 0;
      }
      if (totals_)
        by_dot[p.row - tile.row] -=
            (rows_.total[p.row] + cols_.total[p.col]) * tiling.margin() * tiling.unit();
    }
    // The totals' gradient is added to all pairs alike (see add_totals), so taken back here.
    if (totals_)
      tiling.rules().for_each_masked(tile, [&](int64_t i, int64_t j) {
        tile.at(i, j) -= static_cast<float>(rows_.total[i] + cols_.total[j]);
      });
  }

  // After all tiles that are in memory.
  void merge(std::span<const Tile> tiles) {
    by_dot_.merge(tiles);
    apart_.merge(tiles);
  }

  const AllApart& apart() const { return apart_; }

  // The sum of all derivatives times their dot products, those of the totals apart.
  double by_dot() const { return by_dot_.sum(); }

 private:
  float shift_;
  const Direction &rows_, &cols_;
  bool totals_;
  RowTotals by_dot_;
  AllApart apart_;
  bool one_exponential_ = false;
  std::vector<float> row_weight_, col_weight_;  // upstream gradients with the shifts folded in
  std::vector<float> row_shift_, col_shift_;    // only where each has its own
};

// out[i] += own[i] * (sum of all b) + (sum of other[j] * b[j]): what a derivative of own[i] +
// other[j] by every logit makes of the features. `out` may have no rows. Returns what own[i] makes
// of the scale: the sum of own[i] * <a[i], sum of all b>.
double add_totals(const Tensor& out, const FloatRows& a, const FloatRows& b,
                  const std::vector<double>& own, const std::vector<double>& other) {
  const int64_t features = b.features();
  const std::vector<double> all = b.sum(), weighted = b.sum(&other), dots = a.dots(all);
  double by_scale = 0;
  for (int64_t i = 0; i < a.rows(); ++i) by_scale += own[i] * dots[i];
  float* data = out.size(0) > 0 ? static_cast<float*>(out.mutable_data_ptr()) : nullptr;
  for (int64_t i = 0; i < out.size(0); ++i)
    for (int64_t d = 0; d < features; ++d)
      data[i * features + d] += static_cast<float>(own[i] * all[d] + weighted[d]);
  return by_scale;
}

}  // namespace

StatsGradients stats_gradients(Tiling& tiling, const Direction& rows, const Direction& cols,
                               bool totals, bool need_x, bool need_y) {
  Gradient gradient(tiling, rows, cols, totals);
  FeatureGradients grads(tiling, need_x, need_y);
  std::optional<RoundingLoss> loss;
  if (!tiling.products().exact()) loss.emplace(tiling, rows.grad, cols.grad);
  tiling.for_each([&](std::span<Tile> tiles) {
    tiling.share(tiles, [&](Tile& tile) {
      gradient.apply(tiling, tile);
      if (loss) loss->take(tile);
      grads.take(tile);
    });
    gradient.merge(tiles);
    if (loss) loss->merge(tiles);
    grads.merge(tiles);
  });
  grads.finish();
  grads.add(gradient.apart());
  if (loss) loss->give_back(tiling, grads);
  double by_scale = gradient.by_dot() / tiling.unit();
  if (totals) {
    by_scale += add_totals(grads.x(), tiling.x(), tiling.y(), rows.total, cols.total);
    by_scale += add_totals(grads.y(), tiling.y(), tiling.x(), cols.total, rows.total);
  }
  grads.multiply(tiling.scale());
  return {grads.x(), grads.y(), by_scale};
}

std::tuple<Tensor, Tensor, Tensor> similarity_stats_bwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale,
    const std::optional<Tensor>& row_class, const std::optional<Tensor>& col_class,
    const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask, double margin,
    bool totals, const Tensor& row_lse, const Tensor& col_lse, const Tensor& kept,
    const Tensor& grad_rows, const Tensor& grad_cols, bool need_x, bool need_y) {
  Tiling tiling(x, y, logit_scale, PairRules(row_class, col_class, row_mask, col_mask), margin);
  tiling.take_from(kept);
  STD_TORCH_CHECK(row_lse.numel() == tiling.rows() && col_lse.numel() == tiling.cols(),
                  "one LSE for each row and each column");
  const StatsGradients grads = stats_gradients(
      tiling, direction(row_lse, grad_rows), direction(col_lse, grad_cols), totals, need_x, need_y);
  return {torch::stable::to(grads.x, x.scalar_type()), torch::stable::to(grads.y, y.scalar_type()),
          number(x, grads.scale)};
}

}  // namespace m3bind::cpu
