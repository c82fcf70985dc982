// One direction of InfoNCE: all tiles of some rows hold what their losses need, so their gradients
// are formed in the forward pass, from one product x @ y.T.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "feature_gradients.h"
#include "info_nce.h"
#include "rounding_loss.h"
#include "tiling.h"
#include "whole_tensors.h"

namespace m3bind::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

class RowsLoss {
 public:
  explicit RowsLoss(Tiling& tiling)
      : tiling_(tiling),
        shift_(tiling.common_shift()),
        // With this shift the columns' part of a kernel is 0.
        no_shift_(tiling.cols(), kInf),
        no_weight_(tiling.cols()),
        sums_(tiling.row_totals()),
        by_dot_(tiling.row_totals()),
        apart_(tiling) {}

  // Before derive(): computes all tiles of some rows, and adds up their losses.
  void sum(std::span<Tile> tiles) {
    tiling_.share(tiles, [&](Tile& tile) { tiling_.compute(tile); });
    const Range& rows = tiles.front();
    shifts_.assign(rows.rows, shift_);
    common_ = std::isfinite(shift_);
    if (common_) {
      sum_up(tiles, [&](const Tile& tile, double* row_sums, float* unused) {
        row_kernels().sum_shifted(tile.data, tile.rows, tile.cols, tiling_.factor(), shift_,
                                  row_sums, unused);
      });
      // Not where it loses a row to underflow.
      const double smallest = std::exp2(tiling_.smallest_log2_sum());
      common_ = std::all_of(row_sums_.begin(), row_sums_.end(),
                            [&](double sum) { return sum >= smallest; });
    }
    if (!common_) {
      raise_shifts(tiles);
      sum_up(tiles, [&](const Tile& tile, double* row_sums, float* unused) {
        row_kernels().sum_own_shift(tile.data, tile.rows, tile.cols, tiling_.factor(),
                                    shifts_.data(), no_shift_.data(), row_sums, unused);
      });
    }
    by_positive_.assign(rows.rows, 0);
    weights_.assign(rows.rows, 0);
    for (const Tile& tile : tiles) {
      for (const Positive& p : tile.positives) {
        const int64_t i = p.row - rows.row;
        const double log2_sum = std::log2(row_sums_[i]) + shifts_[i];
        const double t = log2_sum / kLog2E - tiling_.logit(p.dot);
        loss_ += std::max(t, 0.0) + std::log1p(std::exp(-std::abs(t)));
        by_positive_[i] = 1 / (1 + std::exp(-t));
        // times 2^(logit - shift) it is the weight times the softmax; a sum of 0 has no logits
        weights_[i] = row_sums_[i] == 0 ? 0 : static_cast<float>(by_positive_[i] / row_sums_[i]);
      }
    }
  }

  // Replaces the dot products of a tile by derivatives; by any thread.
  void derive(Tile& tile) {
    double* by_dot = by_dot_.of(tile);
    if (common_)
      row_kernels().gradient_shifted(tile.data, tile.rows, tile.cols, tiling_.factor(), shift_,
                                     weights_.data(), no_weight_.data(), by_dot);
    else
      row_kernels().gradient_own_shift(tile.data, tile.rows, tile.cols, tiling_.factor(),
                                       shifts_.data(), weights_.data(), no_shift_.data(),
                                       no_weight_.data(), by_dot);
    for (const Positive& p : tile.positives) {
      const double grad = -by_positive_[p.row - tile.row];
      by_dot[p.row - tile.row] += grad * p.dot;
      const bool exact = tiling_.products().exact();
      tile.at(p.row, p.col) = exact ? static_cast<float>(grad) : 0;
      if (!exact) apart_.of(tile).push_back({p.row, p.col, static_cast<float>(grad)});
    }
  }

  // After derive() on all of them.
  void merge(std::span<const Tile> tiles) {
    by_dot_.merge(tiles);
    apart_.merge(tiles);
  }

  double loss() const { return loss_; }
  double by_dot() const { return by_dot_.sum(); }
  const AllApart& apart() const { return apart_; }

 private:
  // add(tile, sums of its rows, space for sums of its columns, which nobody reads)
  template <class F>
  void sum_up(std::span<Tile> tiles, const F& add) {
    tiling_.share(tiles, [&](Tile& tile) {
      std::vector<float> unused(tile.cols);
      add(tile, sums_.of(tile), unused.data());
    });
    row_sums_.assign(tiles.front().rows, 0);
    for (const Tile& tile : tiles)
      for (int64_t i = 0; i < tile.rows; ++i) row_sums_[i] += std::exchange(sums_.of(tile)[i], 0.0);
  }

  // To the largest logit of each row.
  void raise_shifts(std::span<Tile> tiles) {
    maxima_.assign(tiles.size() * kTileRows, -kInf);
    const auto of = [&](const Tile& tile) { return maxima_.data() + tile.slot * kTileRows; };
    tiling_.share(tiles, [&](Tile& tile) {
      std::vector<float> unused(tile.cols);
      row_kernels().maxima(tile.data, tile.rows, tile.cols, tiling_.factor(), of(tile),
                           unused.data());
    });
    shifts_.assign(shifts_.size(), -kInf);
    for (const Tile& tile : tiles)
      for (int64_t i = 0; i < tile.rows; ++i) shifts_[i] = std::max(shifts_[i], of(tile)[i]);
    for (float& shift : shifts_) shift = shift == -kInf ? 0 : shift;
  }

  Tiling& tiling_;
  float shift_;
  std::vector<float> no_shift_, no_weight_;
  RowTotals sums_, by_dot_;
  AllApart apart_;
  // Of the rows at hand:
  bool common_ = false;  // their shifts are all shift_
  std::vector<float> shifts_, weights_;
  std::vector<float> maxima_;  // of each slot
  std::vector<double> row_sums_, by_positive_;
  double loss_ = 0;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_rows_fwd(const Tensor& x, const Tensor& y,
                                                             const Tensor& logit_scale,
                                                             double margin, bool mean, bool need_x,
                                                             bool need_y) {
  Tiling tiling(x, y, logit_scale, PairRules(x.size(0)), margin, AtOnce::kRows);
  // Without rows the mean is NaN, as in torch, and the gradients are 0.
  const double divisor = mean ? static_cast<double>(tiling.rows()) : 1;
  const double weight = 1 / std::max(divisor, 1.0);
  FeatureGradients grads(tiling, need_x, need_y);
  RowsLoss rows(tiling);
  std::optional<RoundingLoss> loss;
  if (!tiling.products().exact())  // a row's derivatives sum up to at most 1, before the weight
    loss.emplace(tiling, std::vector<double>(tiling.rows(), 1.0),
                 std::vector<double>(tiling.cols()));
  tiling.for_each([&](std::span<Tile> tiles) {
    rows.sum(tiles);
    tiling.share(tiles, [&](Tile& tile) {
      rows.derive(tile);
      if (loss) loss->take(tile);
      grads.take(tile);
    });
    rows.merge(tiles);
    if (loss) loss->merge(tiles);
    grads.merge(tiles);
  });
  grads.finish();
  grads.add(rows.apart());
  if (loss) loss->give_back(tiling, grads);
  grads.multiply(weight * tiling.scale());
  return {number(x, rows.loss() / divisor), grads.x(), grads.y(),
          number(x, weight * rows.by_dot() / tiling.unit())};
}

}  // namespace m3bind::cpu
