// Pairs of a query and a row of the gallery that must not be found: those of equal ids.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace m3bind::cpu {

using torch::stable::Tensor;

class ExcludedPairs {
 public:
  ExcludedPairs(const std::optional<Tensor>& queries, const std::optional<Tensor>& gallery,
                int64_t num_queries, int64_t num_columns) {
    STD_TORCH_CHECK(queries.has_value() == gallery.has_value(), "ids of both, or of none");
    if (!queries) return;
    for (const auto& [ids, count] :
         {std::pair(*queries, num_queries), std::pair(*gallery, num_columns)})
      STD_TORCH_CHECK(ids.scalar_type() == torch::headeronly::ScalarType::Long && ids.dim() == 1 &&
                          ids.size(0) == count,
                      "one int64 id for each query and each row of the gallery");
    query_ids_ = torch::stable::contiguous(*queries);
    gallery_ids_ = torch::stable::contiguous(*gallery);
    query_id_ = static_cast<const int64_t*>(query_ids_->const_data_ptr());
    gallery_id_ = static_cast<const int64_t*>(gallery_ids_->const_data_ptr());
  }

  bool any() const { return query_id_ != nullptr; }
  bool is(int64_t query, int64_t column) const {
    return any() && query_id_[query] == gallery_id_[column];
  }

  // Prepares columns().
  void sort() {
    if (!any()) return;
    by_id_.reserve(gallery_ids_->numel());
    for (int64_t j = 0; j < gallery_ids_->numel(); ++j) by_id_.emplace_back(gallery_id_[j], j);
    if (!std::is_sorted(by_id_.begin(), by_id_.end())) std::sort(by_id_.begin(), by_id_.end());
  }
  // What a query must not find, (id, column), with ascending columns.
  std::span<const std::pair<int64_t, int64_t>> columns(int64_t query) const {
    if (!any()) return {};
    const int64_t id = query_id_[query];
    const auto begin = std::lower_bound(by_id_.begin(), by_id_.end(), std::pair(id, int64_t{0}));
    const auto end = std::partition_point(begin, by_id_.end(),
                                          [&](const auto& pair) { return pair.first == id; });
    return {begin, end};
  }

 private:
  std::optional<Tensor> query_ids_, gallery_ids_;
  const int64_t* query_id_ = nullptr;
  const int64_t* gallery_id_ = nullptr;
  std::vector<std::pair<int64_t, int64_t>> by_id_;
};

}  // namespace m3bind::cpu
