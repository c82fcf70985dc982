#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace m3bind::cpu {

using torch::stable::Tensor;

// The sum of each row's softplus(logit), of -logit at positives, in double [N]: the losses of
// m3bind/ops/siglip.py. Without classes row i and column i are positive. The logits, logit_scale *
// x @ y.T + logit_bias, exist a few tiles at a time. Results of all three are the same bit
// for bit from call to call.
Tensor siglip_fwd(const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                  const Tensor& logit_bias, const std::optional<Tensor>& row_class,
                  const std::optional<Tensor>& col_class, const std::optional<Tensor>& row_mask,
                  const std::optional<Tensor>& col_mask);

// Gradients of x, y (each [0, D] where it is not needed), scale and bias.
std::tuple<Tensor, Tensor, Tensor, Tensor> siglip_bwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& logit_bias,
    const std::optional<Tensor>& row_class, const std::optional<Tensor>& col_class,
    const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask,
    const Tensor& grad_rows, bool need_x, bool need_y);

// The sum of all losses (or that through N) and its gradients, all in float, from one product
// x @ y.T.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> siglip_total_fwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& logit_bias,
    const std::optional<Tensor>& row_class, const std::optional<Tensor>& col_class,
    const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask, bool mean,
    bool need_x, bool need_y);

}  // namespace m3bind::cpu
