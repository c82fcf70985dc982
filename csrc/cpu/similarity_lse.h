#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace m3bind::cpu {

using torch::stable::Tensor;

// Row and column log-sum-exp of logit_scale * x @ y.T, pairs with equal ids left out. The logits
// exist one panel of rows at a time. Results are the same bit for bit from call to call.
std::tuple<Tensor, Tensor> similarity_lse_fwd(const Tensor& x, const Tensor& y,
                                              const Tensor& logit_scale,
                                              const std::optional<Tensor>& row_ids,
                                              const std::optional<Tensor>& col_ids);

// Gradients of x, y (each [0, D] where it is not needed) and the scale.
std::tuple<Tensor, Tensor, Tensor> similarity_lse_bwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale,
    const std::optional<Tensor>& row_ids, const std::optional<Tensor>& col_ids,
    const Tensor& row_lse, const Tensor& col_lse, const Tensor& grad_row, const Tensor& grad_col,
    bool need_x, bool need_y);

}  // namespace m3bind::cpu
