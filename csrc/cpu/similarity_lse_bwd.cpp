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

// One direction's LSE (base 2) and upstream gradient.
struct Direction {
  std::vector<double> lse, grad;

  Direction(const Tensor& lse_in, const Tensor& grad_in) : lse(read(lse_in)), grad(read(grad_in)) {
    STD_TORCH_CHECK(lse.size() == grad.size(), "one upstream gradient for each LSE");
    for (double& v : lse) {
      // Where nothing was summed every logit is -inf, and any finite shift gives zeros.
      v = v == -std::numeric_limits<double>::infinity() ? 0.0 : v * kLog2E;
    }
  }

  static std::vector<double> read(const Tensor& t) {
    const Tensor wide = torch::stable::contiguous(torch::stable::to(t, ScalarType::Double));
    const double* data = static_cast<const double*>(wide.const_data_ptr());
    return {data, data + wide.numel()};
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

  std::vector<float> own_shifts() const { return {lse.begin(), lse.end()}; }

  // grad * 2^(own shift - lse): makes up for the rounding of the LSE to its own shift.
  std::vector<float> own_weights() const {
    std::vector<float> out(lse.size());
    for (size_t i = 0; i < lse.size(); ++i)
      out[i] = static_cast<float>(grad[i] * std::exp2(static_cast<float>(lse[i]) - lse[i]));
    return out;
  }
};

// The derivative of the LSEs by every logit of a panel, in place of its dot products.
class Gradient {
 public:
  Gradient(const Panels& panels, const Tensor& row_lse, const Tensor& col_lse,
           const Tensor& grad_row, const Tensor& grad_col)
      : shift_(panels.common_shift()) {
    const Direction rows(row_lse, grad_row), cols(col_lse, grad_col);
    if (std::isfinite(shift_)) {
      const double smallest = shift_ + panels.smallest_log2_sum();
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

  void apply(const Panels& panels, int64_t first, int64_t count) const {
    const int64_t cols = panels.cols();
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      float* s = panels.data() + begin * cols;
      if (one_exponential_)
        row_kernels().gradient_shifted(s, cols, end - begin, cols, panels.factor(), shift_,
                                       row_weight_.data() + first + begin, col_weight_.data());
      else
        row_kernels().gradient_own_shift(
            s, cols, end - begin, cols, panels.factor(), row_shift_.data() + first + begin,
            row_weight_.data() + first + begin, col_shift_.data(), col_weight_.data());
    });
  }

 private:
  float shift_;
  bool one_exponential_ = false;
  std::vector<float> row_weight_, col_weight_;  // upstream gradients with the shifts folded in
  std::vector<float> row_shift_, col_shift_;    // only where each has its own
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
