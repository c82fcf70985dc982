#include "info_nce.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "direction.h"
#include "similarity_stats.h"
#include "tiling.h"
#include "whole_tensors.h"

namespace m3bind::cpu {
namespace {

// The rows (or columns) of a tensor of statistics [3, size].
struct Statistics {
  std::vector<double> lse, positive;
  Statistics(const Tensor& t, int64_t size) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == 3 && t.size(1) == size,
                    "statistics are three for each row and each column");
    const std::vector<double> all = read(t);
    lse.assign(all.begin(), all.begin() + size);
    positive.assign(all.begin() + size, all.begin() + 2 * size);
  }
};

// Of the first `count`, which have a positive. Unlike LSE - positive, softplus(LSE of negatives -
// positive) does not cancel.
double losses(const Statistics& stats, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double t = stats.lse[i] - stats.positive[i];
    sum += std::max(t, 0.0) + std::log1p(std::exp(-std::abs(t)));
  }
  return sum;
}

// What one loss of `count` weighs in the result, which is the mean of both directions.
double weight(int64_t count, bool mean) { return 0.5 / (mean ? static_cast<double>(count) : 1.0); }

Direction direction(const Statistics& stats, int64_t count, double upstream) {
  Direction out(stats.lse);
  for (int64_t i = 0; i < count; ++i) {
    out.grad[i] = upstream / (1 + std::exp(stats.positive[i] - stats.lse[i]));
    out.positive[i] = -out.grad[i];
  }
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_fwd(const Tensor& x, const Tensor& y,
                                                        const Tensor& logit_scale, double margin,
                                                        bool mean, int64_t kept_rows) {
  const int64_t count = x.size(0);
  Tiling tiling(x, y, logit_scale, PairRules(count), margin);
  const Tensor kept = torch::stable::new_empty(tiling.x().tensor(), {kept_rows, tiling.cols()},
                                               torch::headeronly::ScalarType::Float);
  tiling.keep_in(kept);
  const auto [rows, cols] = statistics(tiling, false);
  const double sum = losses(Statistics(rows, tiling.rows()), count) +
                     losses(Statistics(cols, tiling.cols()), count);
  return {number(x, sum * weight(count, mean)), rows, cols, kept};
}

std::tuple<Tensor, Tensor, Tensor> info_nce_bwd(const Tensor& x, const Tensor& y,
                                                const Tensor& logit_scale, double margin, bool mean,
                                                const Tensor& rows, const Tensor& cols,
                                                const Tensor& kept, const Tensor& grad, bool need_x,
                                                bool need_y) {
  const int64_t count = x.size(0);
  Tiling tiling(x, y, logit_scale, PairRules(count), margin);
  tiling.take_from(kept);
  const double upstream = read_scalar(grad) * weight(count, mean);
  const StatsGradients grads = stats_gradients(
      tiling, direction(Statistics(rows, tiling.rows()), count, upstream),
      direction(Statistics(cols, tiling.cols()), count, upstream), false, need_x, need_y);
  return {torch::stable::to(grads.x, x.scalar_type()), torch::stable::to(grads.y, y.scalar_type()),
          number(x, grads.scale)};
}

}  // namespace m3bind::cpu
