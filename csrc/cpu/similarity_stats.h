#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace m3bind::cpu {

using torch::stable::Tensor;

class Tiling;
struct Direction;

// Statistics of the rows [3, N] and columns [3, M] of logit_scale * (x @ y.T - margin at
// positives): see m3bind/ops/stats.py. The logits exist a few tiles at a time; the dot
// products of the first `kept_rows` rows, tile after tile, are the third result, [kept_rows, M].
// Results are the same bit for bit from call to call.
std::tuple<Tensor, Tensor, Tensor> similarity_stats_fwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale,
    const std::optional<Tensor>& row_class, const std::optional<Tensor>& col_class,
    const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask, double margin,
    bool totals, int64_t kept_rows);

// Gradients of x, y (each [0, D] where it is not needed) and the scale.
std::tuple<Tensor, Tensor, Tensor> similarity_stats_bwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale,
    const std::optional<Tensor>& row_class, const std::optional<Tensor>& col_class,
    const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask, double margin,
    bool totals, const Tensor& row_lse, const Tensor& col_lse, const Tensor& kept,
    const Tensor& grad_rows, const Tensor& grad_cols, bool need_x, bool need_y);

// The same of a tiling that is made already; gradients in float32.
std::tuple<Tensor, Tensor> statistics(Tiling& tiling, bool totals);
struct StatsGradients {
  Tensor x, y;
  double scale;
};
StatsGradients stats_gradients(Tiling& tiling, const Direction& rows, const Direction& cols,
                               bool totals, bool need_x, bool need_y);

}  // namespace m3bind::cpu
