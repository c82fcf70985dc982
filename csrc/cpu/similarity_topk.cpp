#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "excluded_pairs.h"
#include "first_look.h"
#include "score_tiles.h"
#include "similarity_search.h"

namespace m3bind::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kMostColumns = int64_t{1} << 32;

// A score and its column as one number, greater where the score is, or where it is equal and the
// column is lower. NaN is greater than infinity, -0 equals 0.
uint64_t key(float score, int64_t column) {
  const uint32_t bits = std::bit_cast<uint32_t>(std::isnan(score) ? kNan : score + 0.0f);
  const uint32_t sign = uint32_t{1} << 31;
  const uint32_t ordered = bits & sign ? ~bits : bits | sign;
  return uint64_t{ordered} << 32 | (kMostColumns - 1 - column);
}

float score(uint64_t key) {
  const uint32_t sign = uint32_t{1} << 31;
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>(ordered & sign ? ordered & ~sign : ~ordered);
}

int64_t column(uint64_t key) {
  return kMostColumns - 1 - static_cast<int64_t>(key & (kMostColumns - 1));
}

// The best k so far of each query of a block, and some that may yet turn out not to be.
class Candidates {
 public:
  Candidates(int64_t queries, int64_t k)
      : k_(k),
        capacity_(k + k / 2 + 32),
        keys_(queries * capacity_),
        counts_(queries),
        limits_(queries) {}

  void clear() {
    std::fill(counts_.begin(), counts_.end(), 0);
    std::fill(limits_.begin(), limits_.end(), kNan);  // everything is above NaN
  }

  // Columns come in ascending order, so one that is not above its query's limit is not wanted: of
  // equal scores the first stays.
  const float* limits(int64_t query) const { return limits_.data() + query; }

  void add(int64_t query, float score, int64_t column) {
    uint64_t* keys = keys_.data() + query * capacity_;
    keys[counts_[query]++] = key(score, column);
    if (counts_[query] < capacity_) return;
    std::nth_element(keys, keys + k_ - 1, keys + capacity_, std::greater<>());
    counts_[query] = k_;
    const float last = m3bind::cpu::score(keys[k_ - 1]);
    limits_[query] = std::isnan(last) ? kInf : last;  // only NaN is above infinity
  }

  void write(int64_t query, float* values, int64_t* indices) {
    uint64_t* keys = keys_.data() + query * capacity_;
    const int64_t found = std::min(k_, counts_[query]);
    std::partial_sort(keys, keys + found, keys + counts_[query], std::greater<>());
    for (int64_t i = 0; i < found; ++i) {
      values[i] = score(keys[i]);
      indices[i] = column(keys[i]);
    }
    std::fill(values + found, values + k_, -kInf);
    std::fill(indices + found, indices + k_, -1);
  }

 private:
  int64_t k_, capacity_;
  std::vector<uint64_t> keys_;
  std::vector<int64_t> counts_;
  std::vector<float> limits_;
};

}  // namespace

std::tuple<Tensor, Tensor> similarity_topk_fwd(const Tensor& queries, const Tensor& gallery,
                                               int64_t k, const std::optional<Tensor>& query_ids,
                                               const std::optional<Tensor>& gallery_ids) {
  ScoreTiles tiles(queries, gallery);
  STD_TORCH_CHECK(k >= 1, "k must be at least 1");
  STD_TORCH_CHECK(tiles.num_columns() < kMostColumns, "a gallery of 2^32 rows or more");
  const ExcludedPairs excluded(query_ids, gallery_ids, tiles.num_queries(), tiles.num_columns());
  const int64_t rows = tiles.num_queries();
  Tensor values = torch::stable::new_empty(queries, {rows, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(queries, {rows, k}, ScalarType::Long);
  float* value = static_cast<float*>(values.mutable_data_ptr());
  int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr());
  const ScoreKernels& kernels = score_kernels();
  Candidates candidates(std::min(tiles.block(), rows), k);
  for (int64_t first = 0; first < rows; first += tiles.block()) {
    const int64_t count = std::min(tiles.block(), rows - first);
    tiles.start(first, count);
    candidates.clear();
    FirstLook look(count, 2 * k);
    const auto take = [&](const ScoreTile& tile) {
      const float* limits = candidates.limits(tile.first_query);
      float lowered[kMostQueries];
      if (tile.slack != nullptr) {
        lower_limits(limits, tile.slack, tile.num_queries, lowered);
        limits = lowered;
      }
      uint32_t above[kMostQueries];
      kernels.above(tile.scores, tile.num_queries, limits, above);
      const uint32_t there = ~uint32_t{0} >> (32 - tile.num_columns);
      int64_t second_looks = 0;
      for (int64_t i = 0; i < tile.num_queries; ++i) {
        const int64_t query = tile.first_query + i;
        for (uint32_t bits = above[i] & there; bits != 0; bits &= bits - 1) {
          const int64_t j = std::countr_zero(bits), at = tile.first_column + j;
          if (excluded.is(first + query, at)) continue;
          float found = tile.scores[i * kernels.columns + j];
          if (tile.slack != nullptr) {
            found = tiles.score(query, at);
            ++second_looks;
            if (found <= *candidates.limits(query)) continue;
          }
          candidates.add(query, found, at);
        }
      }
      look.count(second_looks);
    };
    tiles.for_each(take, [&](int64_t column) { return look.pays(column); });
    torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        candidates.write(i, value + (first + i) * k, index + (first + i) * k);
    });
  }
  return {values, indices};
}

}  // namespace m3bind::cpu
