#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "panel.h"
#include "similarity_lse.h"

namespace m3bind::cpu {
namespace {

using torch::headeronly::ScalarType;

// Weights above this could make inf * 0 out of an exponential that underflows.
constexpr double kLargestWeight = 1e37;

// One direction's LSE (base 2) and upstream gradient, as the row kernels want them.
struct Direction {
  std::vector<double> lse;
  std::vector<float> grad;

  Direction(const Tensor& lse_in, const Tensor& grad_in) {
    const Tensor lse_tensor = torch::stable::contiguous(lse_in);
    const Tensor grad_tensor =
        torch::stable::contiguous(torch::stable::to(grad_in, ScalarType::Float));
    const int64_t count = lse_tensor.numel();
    STD_TORCH_CHECK(grad_tensor.numel() == count, "one upstream gradient for each LSE");
    const float* l = static_cast<const float*>(lse_tensor.const_data_ptr());
    const float* g = static_cast<const float*>(grad_tensor.const_data_ptr());
    lse.resize(count);
    grad.assign(g, g + count);
    for (int64_t i = 0; i < count; ++i) {
      // Nothing was summed here: every logit is -inf, and any finite shift gives zeros.
      const bool nothing = l[i] == -std::numeric_limits<float>::infinity();
      lse[i] = nothing ? 0.0 : l[i] * kLog2E;
    }
  }

  // grad * 2^(shift - lse), so that times 2^(logit - shift) it is grad * softmax. Empty where an
  // LSE is below `smallest`, or a weight is too large or not a number.
  std::vector<float> weights(double shift, double smallest) const {
    std::vector<float> out(lse.size());
    for (size_t i = 0; i < lse.size(); ++i) {
      const double weight = grad[i] * std::exp2(shift - lse[i]);
      if (!(lse[i] >= smallest && std::abs(weight) <= kLargestWeight)) return {};
      out[i] = static_cast<float>(weight);
    }
    return out;
  }

  std::vector<float> float_lse() const { return {lse.begin(), lse.end()}; }
};

// The derivative of the LSEs by every logit of a panel, in place of its dot products.
class Gradient {
 public:
  Gradient(const Panels& panels, const Tensor& row_lse, const Tensor& col_lse,
           const Tensor& grad_row, const Tensor& grad_col) {
    const Direction rows(row_lse, grad_row), cols(col_lse, grad_col);
    const double shift = std::ceil(std::max(0.0, panels.bound() * kLog2E - 126.0));
    if (std::isfinite(shift)) {
      // What underflows at 2^-126 is then below float32's rounding of its row's and column's sum.
      const double longest = static_cast<double>(std::max(panels.rows(), panels.cols()));
      const double smallest = shift - 126.0 + 24.0 + std::log2(std::max(1.0, longest));
      shift_ = static_cast<float>(shift);
      row_weight_ = rows.weights(shift, smallest);
      col_weight_ = cols.weights(shift, smallest);
      one_exponential_ =
          row_weight_.size() == rows.lse.size() && col_weight_.size() == cols.lse.size();
    }
    if (one_exponential_) return;
    row_weight_ = rows.grad;
    col_weight_ = cols.grad;
    row_lse_ = rows.float_lse();
    col_lse_ = cols.float_lse();
  }

  void apply(const Panels& panels, int64_t first, int64_t count) const {
    const int64_t cols = panels.cols();
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      float* s = panels.data() + begin * cols;
      if (one_exponential_)
        row_kernels().gradient_shifted(s, cols, end - begin, cols, panels.factor(), shift_,
                                       row_weight_.data() + first + begin, col_weight_.data());
      else
        row_kernels().gradient_own_shift(
            s, cols, end - begin, cols, panels.factor(), row_lse_.data() + first + begin,
            row_weight_.data() + first + begin, col_lse_.data(), col_weight_.data());
    });
  }

 private:
  float shift_ = 0;
  bool one_exponential_ = false;
  std::vector<float> row_weight_, col_weight_;  // upstream gradients, or with the LSE folded in
  std::vector<float> row_lse_, col_lse_;        // only where each has its own shift
};

// Sum over all elements of a * b, in an order that does not depend on the threads.
double dot(const Tensor& a, const Tensor& b) {
  const int64_t rows = a.size(0), cols = a.size(1);
  const float* p = static_cast<const float*>(a.const_data_ptr());
  const float* q = static_cast<const float*>(b.const_data_ptr());
  std::vector<double> parts(rows);
  for_row_blocks(rows, [&](int64_t begin, int64_t end) {
    row_kernels().row_dots(p + begin * cols, q + begin * cols, end - begin, cols,
                           parts.data() + begin);
  });
  double total = 0;
  for (const double part : parts) total += part;
  return total;
}

void multiply(const Tensor& t, double factor) {
  float* data = static_cast<float*>(t.mutable_data_ptr());
  const int64_t cols = t.size(1);
  for_row_blocks(t.size(0), [&](int64_t begin, int64_t end) {
    row_kernels().multiply(data + begin * cols, (end - begin) * cols, static_cast<float>(factor));
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> similarity_lse_bwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale,
    const std::optional<Tensor>& row_ids, const std::optional<Tensor>& col_ids,
    const Tensor& row_lse, const Tensor& col_lse, const Tensor& grad_row, const Tensor& grad_col,
    bool need_x, bool need_y) {
  Panels panels(x, y, logit_scale, row_ids, col_ids);
  STD_TORCH_CHECK(row_lse.numel() == panels.rows() && col_lse.numel() == panels.cols(),
                  "one LSE for each row and each column");
  const Gradient gradient(panels, row_lse, col_lse, grad_row, grad_col);
  const int64_t features = panels.x().size(1);
  // The gradient of the scale is a dot product of x with its own (or y with its own).
  const bool compute_x = need_x || !need_y;
  Tensor grad_x = torch::stable::new_empty(panels.x(), {compute_x ? panels.rows() : 0, features});
  Tensor grad_y = torch::stable::new_zeros(panels.y(), {need_y ? panels.cols() : 0, features});
  for (int64_t first = 0; first < panels.rows(); first += panels.step()) {
    const int64_t count = std::min(panels.step(), panels.rows() - first);
    panels.compute(first, count);
    gradient.apply(panels, first, count);
    const Tensor grad = panels.tensor(count);
    if (compute_x) mm_out(Panels::part(grad_x, first, count), grad, panels.y());
    if (need_y) {
      Tensor turned = grad;
      mm_add(grad_y, torch::stable::transpose(turned, 0, 1),
             Panels::part(panels.x(), first, count));
    }
  }
  const double by_scale = compute_x ? dot(grad_x, panels.x()) : dot(grad_y, panels.y());
  if (!need_x) grad_x = torch::stable::new_empty(panels.x(), {0, features});
  multiply(grad_x, panels.scale());
  multiply(grad_y, panels.scale());
  Tensor grad_scale = torch::stable::new_empty(panels.x(), {});
  *static_cast<float*>(grad_scale.mutable_data_ptr()) = static_cast<float>(by_scale);
  return {torch::stable::to(grad_x, x.scalar_type()), torch::stable::to(grad_y, y.scalar_type()),
          grad_scale};
}

}  // namespace m3bind::cpu
