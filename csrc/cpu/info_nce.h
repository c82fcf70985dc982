#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace m3bind::cpu {

using torch::stable::Tensor;

// Symmetric InfoNCE where row i and column i are each other's only positive, as one number: see
// m3bind/ops/info_nce.py. Then statistics of rows and columns, and the dot products of the first
// `kept_rows` rows, for the backward pass.
std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_fwd(const Tensor& x, const Tensor& y,
                                                        const Tensor& logit_scale, double margin,
                                                        bool mean, int64_t kept_rows);

// Gradients of x, y (each [0, D] where it is not needed) and the scale.
std::tuple<Tensor, Tensor, Tensor> info_nce_bwd(const Tensor& x, const Tensor& y,
                                                const Tensor& logit_scale, double margin, bool mean,
                                                const Tensor& rows, const Tensor& cols,
                                                const Tensor& kept, const Tensor& grad, bool need_x,
                                                bool need_y);

// The rows' direction alone, and its gradients in float.
std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce_rows_fwd(const Tensor& x, const Tensor& y,
                                                             const Tensor& logit_scale,
                                                             double margin, bool mean, bool need_x,
                                                             bool need_y);

}  // namespace m3bind::cpu
