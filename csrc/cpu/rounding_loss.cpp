#include "rounding_loss.h"

#include <algorithm>
#include <cmath>

#include "row_blocks.h"

namespace m3bind::cpu {
namespace {

// out[i] += lost[i] * the mean of the others' rows
void add_mean(const Tensor& out, const std::vector<double>& lost, const FloatRows& others) {
  if (out.size(0) == 0) return;
  const int64_t features = others.features();
  std::vector<double> mean = others.sum();
  for (double& value : mean) value /= static_cast<double>(std::max<int64_t>(1, others.rows()));
  float* to = static_cast<float*>(out.mutable_data_ptr());
  for_row_blocks(out.size(0), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      row_kernels().add_narrow(to + i * features, mean.data(), features, lost[i]);
  });
}

// A share of this size is large: a row has few, and what is lost of the others averages out.
constexpr double kLargeShare = 1.0 / 16;

std::vector<float> limits(const std::vector<double>& grads) {
  std::vector<float> out;
  out.reserve(grads.size());
  for (const double grad : grads) out.push_back(static_cast<float>(kLargeShare * std::abs(grad)));
  return out;
}

}  // namespace

RoundingLoss::RoundingLoss(const Tiling& tiling, const std::vector<double>& row_grads,
                           const std::vector<double>& col_grads)
    : row_limit_(limits(row_grads)),
      col_limit_(limits(col_grads)),
      row_lost_(tiling.row_totals()),
      col_lost_(tiling.cols()),
      apart_(tiling) {}

void RoundingLoss::take(const Tile& tile) {
  struct Found {
    std::vector<Apart>& apart;
    int64_t row, col;
  } found = {apart_.of(tile), tile.row, tile.col};
  sum_columns(tile, col_lost_.data() + tile.col, [&](int64_t begin, int64_t count, float* lost) {
    found.row = tile.row + begin;
    row_kernels().set_apart(
        tile.data + begin * tile.cols, count, tile.cols, row_limit_.data() + found.row,
        col_limit_.data() + tile.col, row_lost_.of(tile) + begin, lost,
        [](void* to, int64_t i, int64_t j, float grad) {
          auto* into = static_cast<Found*>(to);
          into->apart.push_back({into->row + i, into->col + j, grad});
        },
        &found);
  });
}

void RoundingLoss::merge(std::span<const Tile> tiles) {
  row_lost_.merge(tiles);
  apart_.merge(tiles);
}

void RoundingLoss::give_back(const Tiling& tiling, FeatureGradients& gradients) const {
  add_mean(gradients.x(), row_lost_.totals(), tiling.y());
  add_mean(gradients.y(), col_lost_, tiling.x());
  gradients.add(apart_);
}

}  // namespace m3bind::cpu
