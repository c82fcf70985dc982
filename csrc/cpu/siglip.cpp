#include "siglip.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "feature_gradients.h"
#include "tiling.h"
#include "whole_tensors.h"

namespace m3bind::cpu {
namespace {

using torch::headeronly::ScalarType;

struct Gradients {
  Tensor x, y;
  double scale = 0, bias = 0;
};

class Siglip {
 public:
  Siglip(const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& logit_bias,
         PairRules rules)
      : tiling_(x, y),
        rules_(std::move(rules)),
        scale_(read_scalar(logit_scale)),
        bias_(read_scalar(logit_bias)),
        losses_(tiling_.row_totals()) {
    rules_.check(tiling_.rows(), tiling_.cols());
  }

  // Computes the losses alone.
  void forward() {
    tiling_.for_each([&](std::span<Tile> tiles) {
      tiling_.share(tiles, [&](Tile& tile) {
        tiling_.compute(tile);
        std::vector<float> logits(tile.cols);
        for_rows(tile, [&](const Range& row, const float* dots, double* loss) {
          fill_logits(row, dots, logits.data());
          *loss += row_kernels().softplus_sum(logits.data(), row.cols);
        });
      });
      losses_.merge(tiles);
    });
  }

  // Computes the losses, and the gradients of their sum with these weights (without: all 1), times
  // `factor`.
  Gradients with_gradients(const float* weights, double factor, bool need_x, bool need_y) {
    FeatureGradients grads(tiling_, need_x, need_y);
    RowTotals by_scale = tiling_.row_totals(), by_bias = tiling_.row_totals();
    AllApart apart(tiling_);
    tiling_.for_each([&](std::span<Tile> tiles) {
      tiling_.share(tiles, [&](Tile& tile) {
        tiling_.compute(tile);
        std::vector<float> logits(tile.cols), dots;
        for_rows(tile, [&](const Range& row, float* s, double* loss) {
          fill_logits(row, s, logits.data());
          const float weight = weights == nullptr ? 1.0f : weights[row.row];
          const SigmoidSums sums = derive(row, s, logits.data(), weight, dots);
          *loss += sums.softplus;
          by_bias.of(tile)[row.row - tile.row] += sums.sigmoid;
          by_scale.of(tile)[row.row - tile.row] += sums.by_dot;
        });
        if (!tiling_.products().exact()) take_apart(tile, apart.of(tile));
        grads.take(tile);
      });
      for (RowTotals* totals : {&losses_, &by_scale, &by_bias}) totals->merge(tiles);
      apart.merge(tiles);
      grads.merge(tiles);
    });
    grads.finish();
    grads.add(apart);
    grads.multiply(factor * scale_);
    return {grads.x(), grads.y(), factor * by_scale.sum(), factor * by_bias.sum()};
  }

  const RowTotals& losses() const { return losses_; }

 private:
  // f(row, its values, its loss) on the rows of a tile.
  template <class F>
  void for_rows(const Tile& tile, const F& f) {
    for (int64_t i = 0; i < tile.rows; ++i)
      f(Range{tile.row + i, 1, tile.col, tile.cols}, tile.data + i * tile.cols,
        losses_.of(tile) + i);
  }

  // The loss of a pair is softplus of what is written: logits, negated at positives, -inf where
  // masked.
  void fill_logits(const Range& row, const float* dots, float* logits) const {
    row_kernels().affine(dots, logits, row.cols, static_cast<float>(scale_),
                         static_cast<float>(bias_));
    rules_.for_each_masked(row, [&](int64_t, int64_t j) {
      logits[j - row.col] = -std::numeric_limits<float>::infinity();
    });
    rules_.for_each_positive(
        row, [&](int64_t, int64_t j) { logits[j - row.col] = -logits[j - row.col]; });
  }

  // Replaces the dot products of a row by derivatives, and returns what they make of scale and
  // bias. `dots` is space to work in.
  SigmoidSums derive(const Range& row, float* s, const float* logits, float weight,
                     std::vector<float>& dots) const {
    dots.clear();
    rules_.for_each_positive(row, [&](int64_t, int64_t j) { dots.push_back(s[j - row.col]); });
    SigmoidSums sums = row_kernels().sigmoid(logits, s, row.cols, weight);
    sums.sigmoid *= weight;
    sums.by_dot *= weight;
    const float* dot = dots.data();
    rules_.for_each_positive(row, [&](int64_t, int64_t j) {
      float& grad = s[j - row.col];
      sums.sigmoid -= 2.0 * grad;
      sums.by_dot -= 2.0 * grad * *dot++;
      grad = -grad;
    });
    return sums;
  }

  // Moves the derivatives at lone positives out of a tile.
  void take_apart(const Tile& tile, std::vector<Apart>& apart) const {
    rules_.for_each_positive(tile, [&](int64_t i, int64_t j) {
      if (!rules_.is_lone(i)) return;
      apart.push_back({i, j, tile.at(i, j)});
      tile.at(i, j) = 0;
    });
  }

  Tiling tiling_;
  PairRules rules_;
  double scale_, bias_;
  RowTotals losses_;
};

PairRules rules(const Tensor& x, const std::optional<Tensor>& row_class,
                const std::optional<Tensor>& col_class, const std::optional<Tensor>& row_mask,
                const std::optional<Tensor>& col_mask) {
  if (!row_class) return PairRules(x.size(0), row_mask, col_mask);
  return PairRules(row_class, col_class, row_mask, col_mask);
}

}  // namespace

Tensor siglip_fwd(const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                  const Tensor& logit_bias, const std::optional<Tensor>& row_class,
                  const std::optional<Tensor>& col_class, const std::optional<Tensor>& row_mask,
                  const std::optional<Tensor>& col_mask) {
  Siglip siglip(x, y, logit_scale, logit_bias, rules(x, row_class, col_class, row_mask, col_mask));
  siglip.forward();
  Tensor out = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Double);
  const std::vector<double>& losses = siglip.losses().totals();
  std::copy(losses.begin(), losses.end(), static_cast<double*>(out.mutable_data_ptr()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_bwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& logit_bias,
    const std::optional<Tensor>& row_class, const std::optional<Tensor>& col_class,
    const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask,
    const Tensor& grad_rows, bool need_x, bool need_y) {
  Siglip siglip(x, y, logit_scale, logit_bias, rules(x, row_class, col_class, row_mask, col_mask));
  STD_TORCH_CHECK(grad_rows.numel() == x.size(0), "one upstream gradient for each row");
  const Tensor weights = torch::stable::contiguous(torch::stable::to(grad_rows, ScalarType::Float));
  const Gradients grads =
      siglip.with_gradients(static_cast<const float*>(weights.const_data_ptr()), 1, need_x, need_y);
  return {torch::stable::to(grads.x, x.scalar_type()), torch::stable::to(grads.y, y.scalar_type()),
          number(x, grads.scale), number(x, grads.bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_total_fwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& logit_bias,
    const std::optional<Tensor>& row_class, const std::optional<Tensor>& col_class,
    const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask, bool mean,
    bool need_x, bool need_y) {
  Siglip siglip(x, y, logit_scale, logit_bias, rules(x, row_class, col_class, row_mask, col_mask));
  // Without rows the mean is NaN, as in torch, and the gradients are 0.
  const double divisor = mean ? static_cast<double>(x.size(0)) : 1;
  const double factor = 1 / std::max(divisor, 1.0);
  const Gradients grads = siglip.with_gradients(nullptr, factor, need_x, need_y);
  return {number(x, siglip.losses().sum() / divisor), grads.x, grads.y, number(x, grads.scale),
          number(x, grads.bias)};
}

}  // namespace m3bind::cpu
