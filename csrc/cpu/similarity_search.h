#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace m3bind::cpu {

using torch::stable::Tensor;

// The k best rows of the gallery for each query, values float32 [N, k] and indices int64 [N, k];
// see m3bind/ops/topk.py. Pairs of equal ids, int64 [N] and [M], are left out. Both operators give
// the same bits from call to call and for any number of threads.
std::tuple<Tensor, Tensor> similarity_topk_fwd(const Tensor& queries, const Tensor& gallery,
                                               int64_t k, const std::optional<Tensor>& query_ids,
                                               const std::optional<Tensor>& gallery_ids);

// The ranks int64 [N, P] of the rows of the gallery that `labels` [N, P] names; see
// m3bind/ops/rank.py.
Tensor similarity_rank_fwd(const Tensor& queries, const Tensor& gallery, const Tensor& labels,
                           const std::optional<Tensor>& query_ids,
                           const std::optional<Tensor>& gallery_ids);

}  // namespace m3bind::cpu
