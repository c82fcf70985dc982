#include "siglip.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "panel.h"

namespace m3bind::cpu {
namespace {

using torch::headeronly::ScalarType;

struct Gradients {
  Tensor x, y;  // float; [0, D] where it is not needed
  double scale, bias;
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
        for (int64_t i = begin; i < end; ++i)
          losses_[first + i] = row_kernels().softplus_sum(logits(first, i), panels_.cols());
      });
    });
  }

  // Computes the losses, and the gradients of their sum with these weights (without: all 1).
  Gradients with_gradients(const float* weights, bool need_x, bool need_y) {
    const int64_t features = panels_.x().size(1);
    // The gradient of the scale is a dot product of x with its own (or y with its own).
    const bool compute_x = need_x || !need_y;
    Gradients out{torch::stable::new_empty(panels_.x(), {compute_x ? panels_.rows() : 0, features}),
                  torch::stable::new_zeros(panels_.y(), {need_y ? panels_.cols() : 0, features}), 0,
                  0};
    std::vector<double> sums(panels_.rows());
    for_panels([&](int64_t first, int64_t count) {
      for_row_blocks(count, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          sums[first + i] = gradient(first, i, weights == nullptr ? 1.0f : weights[first + i]);
      });
      const Tensor grad = panels_.tensor(count);
      if (compute_x) mm_out(Panels::part(out.x, first, count), grad, panels_.y());
      if (need_y) {
        Tensor turned = grad;
        mm_add(out.y, torch::stable::transpose(turned, 0, 1),
               Panels::part(panels_.x(), first, count));
      }
    });
    for (const double sum : sums) out.bias += sum;
    out.scale = compute_x ? dot(out.x, panels_.x()) : dot(out.y, panels_.y());
    if (!need_x) out.x = torch::stable::new_empty(panels_.x(), {0, features});
    multiply(out.x, scale_);
    multiply(out.y, scale_);
    return out;
  }

  const std::vector<double>& losses() const { return losses_; }

 private:
  template <class F>
  void for_panels(const F& f) {
    for (int64_t first = 0; first < panels_.rows(); first += panels_.step()) {
      const int64_t count = std::min(panels_.step(), panels_.rows() - first);
      panels_.compute(first, count, [](int64_t, int64_t, double) {});
      f(first, count);
    }
  }

  // Row i of the panel that starts at `first`: logits in place of dot products, negated at
  // positives, -inf where masked.
  float* logits(int64_t first, int64_t i) const {
    float* row = panels_.data() + i * panels_.cols();
    row_kernels().affine(row, panels_.cols(), static_cast<float>(scale_),
                         static_cast<float>(bias_));
    rules_.for_each_masked(first + i, 1, [&](int64_t, int64_t j) {
      row[j] = -std::numeric_limits<float>::infinity();
    });
    rules_.for_each_positive(first + i, 1, [&](int64_t, int64_t j) { row[j] = -row[j]; });
    return row;
  }

  // The same row: the derivative by the logits in place of dot products. Returns its sum.
  double gradient(int64_t first, int64_t i, float weight) {
    float* row = logits(first, i);
    const SigmoidSums sums = row_kernels().sigmoid(row, panels_.cols(), weight);
    losses_[first + i] = sums.softplus;
    double sum = weight * sums.sigmoid;
    rules_.for_each_positive(first + i, 1, [&](int64_t, int64_t j) {
      sum -= 2.0 * row[j];
      row[j] = -row[j];
    });
    return sum;
  }

  Panels panels_;
  PairRules rules_;
  double scale_, bias_;
  std::vector<double> losses_;
};

Tensor number(const Tensor& like, double value) {
  Tensor out = torch::stable::new_empty(like, {}, ScalarType::Float);
  *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(value);
  return out;
}

}  // namespace

Tensor siglip_fwd(const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                  const Tensor& logit_bias, const std::optional<Tensor>& row_class,
                  const std::optional<Tensor>& col_class, const std::optional<Tensor>& row_mask,
                  const std::optional<Tensor>& col_mask) {
  Siglip siglip(x, y, logit_scale, logit_bias, PairRules(row_class, col_class, row_mask, col_mask));
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
  Siglip siglip(x, y, logit_scale, logit_bias, PairRules(row_class, col_class, row_mask, col_mask));
  STD_TORCH_CHECK(grad_rows.numel() == x.size(0), "one upstream gradient for each row");
  const Tensor weights = torch::stable::contiguous(torch::stable::to(grad_rows, ScalarType::Float));
  const Gradients grads =
      siglip.with_gradients(static_cast<const float*>(weights.const_data_ptr()), need_x, need_y);
  return {torch::stable::to(grads.x, x.scalar_type()), torch::stable::to(grads.y, y.scalar_type()),
          number(x, grads.scale), number(x, grads.bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_total_fwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& logit_bias,
    const std::optional<Tensor>& row_class, const std::optional<Tensor>& col_class,
    const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask, bool mean,
    bool need_x, bool need_y) {
  Siglip siglip(x, y, logit_scale, logit_bias, PairRules(row_class, col_class, row_mask, col_mask));
  const Gradients grads = siglip.with_gradients(nullptr, need_x, need_y);
  double total = 0;
  for (const double loss : siglip.losses()) total += loss;
  if (mean) total /= static_cast<double>(x.size(0));
  return {number(x, total), grads.x, grads.y, number(x, grads.scale), number(x, grads.bias)};
}

}  // namespace m3bind::cpu
