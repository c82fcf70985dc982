// One direction of InfoNCE: a panel of rows holds all that their losses need, so their gradients
// are formed in the forward pass, from one product x @ y.T.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "block_columns.h"
#include "feature_gradients.h"
#include "info_nce.h"
#include "panel.h"
#include "rounding_loss.h"
#include "whole_tensors.h"

namespace m3bind::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

class RowsLoss {
 public:
  explicit RowsLoss(Panels& panels)
      : panels_(panels),
        shift_(panels.common_shift()),
        columns_(panels.step(), panels.cols()),
        // With this shift the columns' part of a kernel is 0.
        no_shift_(panels.cols(), kInf),
        no_weight_(panels.cols()) {}

  // Replaces the dot products of a panel by derivatives, and adds up losses.
  void derive(int64_t first, int64_t count) {
    panels_.compute(first, count, [](int64_t, int64_t, float) {});
    shifts_.assign(count, shift_);
    sums_.assign(count, 0);
    const bool common = std::isfinite(shift_) && sum_with_common_shift(count);
    if (!common) sum_with_own_shifts(count);
    weights_.resize(count);
    const auto& positives = panels_.positives();
    for (int64_t i = 0; i < count; ++i) {
      const double log2_sum = std::log2(sums_[i]) + shifts_[i];
      const double t = log2_sum / kLog2E - panels_.logit(positives[i].dot);
      loss_ += std::max(t, 0.0) + std::log1p(std::exp(-std::abs(t)));
      by_positive_.push_back(1 / (1 + std::exp(-t)));
      // times 2^(logit - shift) it is the weight times the softmax; a sum of 0 has no logits
      weights_[i] = sums_[i] == 0 ? 0 : static_cast<float>(by_positive_.back() / sums_[i]);
    }
    std::vector<double> by_dot(count);
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      const int64_t cols = panels_.cols();
      float* s = panels_.data() + begin * cols;
      if (common)
        row_kernels().gradient_shifted(s, cols, end - begin, cols, panels_.factor(), shift_,
                                       weights_.data() + begin, no_weight_.data(),
                                       by_dot.data() + begin);
      else
        row_kernels().gradient_own_shift(
            s, cols, end - begin, cols, panels_.factor(), shifts_.data() + begin,
            weights_.data() + begin, no_shift_.data(), no_weight_.data(), by_dot.data() + begin);
    });
    for (const double sum : by_dot) by_dot_ += sum;
    for (const Positive& p : positives) {
      const double grad = -by_positive_[p.row];
      by_dot_ += grad * p.dot;
      float& value = panels_.data()[(p.row - first) * panels_.cols() + p.col];
      value = panels_.exact() ? static_cast<float>(grad) : 0;
      if (!panels_.exact()) apart_.push_back({p.row, p.col, static_cast<float>(grad)});
    }
  }

  double loss() const { return loss_; }
  double by_dot() const { return by_dot_; }
  const std::vector<Apart>& apart() const { return apart_; }

 private:
  // False where it loses a row to underflow.
  bool sum_with_common_shift(int64_t count) {
    const int64_t cols = panels_.cols();
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      row_kernels().sum_shifted(panels_.data() + begin * cols, cols, end - begin, cols,
                                panels_.factor(), shift_, sums_.data() + begin,
                                columns_.start(begin, 0));
    });
    const double smallest = std::exp2(panels_.smallest_log2_sum());
    return std::all_of(sums_.begin(), sums_.end(), [&](double sum) { return sum >= smallest; });
  }

  void sum_with_own_shifts(int64_t count) {
    const int64_t cols = panels_.cols();
    shifts_.assign(count, -kInf);
    sums_.assign(count, 0);
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      const float* s = panels_.data() + begin * cols;
      row_kernels().maxima(s, cols, end - begin, cols, panels_.factor(), shifts_.data() + begin,
                           columns_.start(begin, -kInf));
      for (int64_t i = begin; i < end; ++i) shifts_[i] = shifts_[i] == -kInf ? 0 : shifts_[i];
      row_kernels().sum_own_shift(s, cols, end - begin, cols, panels_.factor(),
                                  shifts_.data() + begin, no_shift_.data(), sums_.data() + begin,
                                  columns_.start(begin, 0));
    });
  }

  Panels& panels_;
  float shift_;
  BlockColumns columns_;  // the kernels' other direction, which nobody reads
  std::vector<float> no_shift_, no_weight_;
  std::vector<float> shifts_, weights_;  // of the panel's rows
  std::vector<double> sums_;
  std::vector<double> by_positive_;  // of all rows
  std::vector<Apart> apart_;
  double loss_ = 0, by_dot_ = 0;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_rows_fwd(const Tensor& x, const Tensor& y,
                                                             const Tensor& logit_scale,
                                                             double margin, bool mean, bool need_x,
                                                             bool need_y) {
  Panels panels(x, y, logit_scale, PairRules(x.size(0)), margin);
  // Without rows the mean is NaN, as in torch, and the gradients are 0.
  const double divisor = mean ? static_cast<double>(panels.rows()) : 1;
  const double weight = 1 / std::max(divisor, 1.0);
  FeatureGradients grads(panels, need_x, need_y);
  RowsLoss rows(panels);
  std::optional<RoundingLoss> loss;
  if (!panels.exact())  // a row's derivatives sum up to at most 1, before the weight
    loss.emplace(panels, std::vector<double>(panels.rows(), 1.0),
                 std::vector<double>(panels.cols()));
  panels.for_each([&](int64_t first, int64_t count) {
    rows.derive(first, count);
    if (loss) loss->take(panels, first, count);
    grads.take(first, count);
  });
  grads.finish();
  grads.add(rows.apart());
  if (loss) loss->give_back(panels, grads);
  grads.multiply(weight * panels.scale());
  return {number(x, rows.loss() / divisor), grads.x(), grads.y(),
          number(x, weight * panels.sign() * rows.by_dot())};
}

}  // namespace m3bind::cpu
