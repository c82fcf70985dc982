#include "siglip.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "feature_gradients.h"
#include "panel.h"
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
      : panels_(x, y),
        rules_(std::move(rules)),
        scale_(read_scalar(logit_scale)),
        bias_(read_scalar(logit_bias)),
        losses_(panels_.rows()) {
    rules_.check(panels_.rows(), panels_.cols());
  }

  // Computes the losses alone.
  void forward() {
    for_panels([&](int64_t first, int64_t count) {
      for_row_blocks(count, [&](int64_t begin, int64_t end) {
        std::vector<float> logits(panels_.cols());
        for (int64_t i = first + begin; i < first + end; ++i) {
          fill_logits(i, row(first, i), logits.data());
          losses_[i] = row_kernels().softplus_sum(logits.data(), panels_.cols());
        }
      });
    });
  }

  // Computes the losses, and the gradients of their sum with these weights (without: all 1), times
  // `factor`.
  Gradients with_gradients(const float* weights, double factor, bool need_x, bool need_y) {
    const int64_t cols = panels_.cols();
    FeatureGradients grads(panels_, need_x, need_y);
    by_scale_.assign(panels_.rows(), 0);
    by_bias_.assign(panels_.rows(), 0);
    std::vector<Apart> apart;
    for_panels([&](int64_t first, int64_t count) {
      for_row_blocks(count, [&](int64_t begin, int64_t end) {
        std::vector<float> logits(cols), dots;
        for (int64_t i = first + begin; i < first + end; ++i) {
          fill_logits(i, row(first, i), logits.data());
          derive(i, row(first, i), logits.data(), weights == nullptr ? 1.0f : weights[i], dots);
        }
      });
      if (!panels_.exact()) take_apart(first, count, apart);
      grads.take(first, count);
    });
    grads.finish();
    grads.add(apart);
    grads.multiply(factor * scale_);
    Gradients out{grads.x(), grads.y()};
    for (const double sum : by_bias_) out.bias += sum;
    for (const double sum : by_scale_) out.scale += sum;
    out.bias *= factor;
    out.scale *= factor;
    return out;
  }

  const std::vector<double>& losses() const { return losses_; }

 private:
  template <class F>
  void for_panels(const F& f) {
    panels_.for_each([&](int64_t first, int64_t count) {
      panels_.compute(first, count, [](int64_t, int64_t, float) {});
      f(first, count);
    });
  }

  // Row i, in the panel that starts at `first`.
  float* row(int64_t first, int64_t i) const {
    return panels_.data() + (i - first) * panels_.cols();
  }

  // The loss of a pair is softplus of what is written: logits, negated at positives, -inf where
  // masked.
  void fill_logits(int64_t i, const float* dots, float* logits) const {
    row_kernels().affine(dots, logits, panels_.cols(), static_cast<float>(scale_),
                         static_cast<float>(bias_));
    rules_.for_each_masked(
        i, 1, [&](int64_t, int64_t j) { logits[j] = -std::numeric_limits<float>::infinity(); });
    rules_.for_each_positive(i, 1, [&](int64_t, int64_t j) { logits[j] = -logits[j]; });
  }

  // Replaces the dot products of row i by derivatives, and adds up what they make of scale and
  // bias. `dots` is space to work in.
  void derive(int64_t i, float* s, const float* logits, float weight, std::vector<float>& dots) {
    dots.clear();
    rules_.for_each_positive(i, 1, [&](int64_t, int64_t j) { dots.push_back(s[j]); });
    const SigmoidSums sums = row_kernels().sigmoid(logits, s, panels_.cols(), weight);
    losses_[i] = sums.softplus;
    by_bias_[i] = weight * sums.sigmoid;
    by_scale_[i] = weight * sums.by_dot;
    const float* dot = dots.data();
    rules_.for_each_positive(i, 1, [&](int64_t, int64_t j) {
      by_bias_[i] -= 2.0 * s[j];
      by_scale_[i] -= 2.0 * s[j] * *dot++;
      s[j] = -s[j];
    });
  }

  // Moves the derivatives at lone positives out of the panel.
  void take_apart(int64_t first, int64_t count, std::vector<Apart>& apart) const {
    rules_.for_each_positive(first, count, [&](int64_t i, int64_t j) {
      if (!rules_.is_lone(i)) return;
      float& grad = row(first, i)[j];
      apart.push_back({i, j, grad});
      grad = 0;
    });
  }

  Panels panels_;
  PairRules rules_;
  double scale_, bias_;
  std::vector<double> losses_, by_scale_, by_bias_;  // of each row
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
  std::copy(siglip.losses().begin(), siglip.losses().end(),
            static_cast<double*>(out.mutable_data_ptr()));
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
  double total = 0;
  for (const double loss : siglip.losses()) total += loss;
  return {number(x, total / divisor), grads.x, grads.y, number(x, grads.scale),
          number(x, grads.bias)};
}

}  // namespace m3bind::cpu
