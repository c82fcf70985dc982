#include "rounding_loss.h"

#include <algorithm>
#include <cmath>

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

RoundingLoss::RoundingLoss(const Panels& panels, const std::vector<double>& row_grads,
                           const std::vector<double>& col_grads)
    : row_limit_(limits(row_grads)),
      col_limit_(limits(col_grads)),
      row_lost_(panels.rows()),
      col_lost_(panels.cols()),
      columns_(panels.step(), panels.cols()) {}

void RoundingLoss::take(const Panels& panels, int64_t first, int64_t count) {
  const int64_t cols = panels.cols();
  std::vector<std::vector<Apart>> apart((count + kBlockRows - 1) / kBlockRows);
  for_row_blocks(count, [&](int64_t begin, int64_t end) {
    struct Found {
      std::vector<Apart>& apart;
      int64_t first;
    } found = {apart[begin / kBlockRows], first + begin};
    row_kernels().set_apart(
        panels.data() + begin * cols, cols, end - begin, cols, row_limit_.data() + first + begin,
        col_limit_.data(), row_lost_.data() + first + begin, columns_.start(begin, 0),
        [](void* to, int64_t i, int64_t j, float grad) {
          auto* into = static_cast<Found*>(to);
          into->apart.push_back({into->first + i, j, grad});
        },
        &found);
  });
  columns_.merge(count, [&](int64_t j, float lost) { col_lost_[j] += lost; });
  for (const std::vector<Apart>& block : apart)
    apart_.insert(apart_.end(), block.begin(), block.end());
}

void RoundingLoss::give_back(const Panels& panels, FeatureGradients& gradients) const {
  add_mean(gradients.x(), row_lost_, panels.y());
  add_mean(gradients.y(), col_lost_, panels.x());
  gradients.add(apart_);
}

}  // namespace m3bind::cpu
