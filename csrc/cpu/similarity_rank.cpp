#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "excluded_pairs.h"
#include "first_look.h"
#include "score_tiles.h"
#include "similarity_search.h"

namespace m3bind::cpu {
namespace {

using torch::headeronly::ScalarType;

// The low `count` bits.
uint32_t low_bits(int64_t count) {
  return count <= 0 ? 0 : ~uint32_t{0} >> (32 - std::min<int64_t>(count, 32));
}

// A row of the gallery whose rank is wanted.
struct Positive {
  int64_t column = -1;  // below 0: none
  int64_t rank = 0;
  bool is_nan = false;
};

// The positives of one block of queries, `slots` a query. Those of one panel of queries lie
// together, slot by slot, so that a kernel takes one slot of all its queries at once.
class Positives {
 public:
  using Column = std::pair<int64_t, int64_t>;

  Positives(int64_t queries, int64_t slots)
      : width_(score_kernels().queries), slots_(slots), excluded_(queries) {
    const int64_t padded = (queries + width_ - 1) / width_ * width_;
    positives_.resize(padded * slots);
    limits_.resize(padded * slots);
  }

  // `labels` of queries [first, first + count) of all.
  void start(const ScoreTiles& tiles, const int64_t* labels, const ExcludedPairs& excluded,
             int64_t first, int64_t count) {
    torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> columns;
      std::vector<float> scores(slots_);
      for (int64_t i = begin; i < end; ++i) {
        excluded_[i] = excluded.columns(first + i);
        columns.clear();
        for (int64_t slot = 0; slot < slots_; ++slot) {
          const int64_t label = labels[(first + i) * slots_ + slot];
          const bool none = label < 0 || excluded.is(first + i, label);
          positives_[at(i, slot)] = {none ? -1 : label, none ? 0 : 1, false};
          columns.push_back(none ? 0 : label);
        }
        tiles.listed(i, columns.data(), slots_, scores.data());
        for (int64_t slot = 0; slot < slots_; ++slot) {
          // Above infinity is only NaN: all that may rank before a NaN.
          const bool is_nan = std::isnan(scores[slot]);
          positives_[at(i, slot)].is_nan = is_nan;
          limits_[at(i, slot)] = is_nan ? std::numeric_limits<float>::infinity() : scores[slot];
        }
      }
    });
  }

  // Returns how many scores it looked at again.
  int64_t count(const ScoreTiles& tiles, const ScoreTile& tile) {
    uint32_t allowed[kMostQueries];
    for (int64_t i = 0; i < tile.num_queries; ++i)
      allowed[i] = low_bits(tile.num_columns) & ~excluded_bits(tile, tile.first_query + i);
    int64_t second_looks = 0;
    for (int64_t slot = 0; slot < slots_; ++slot) {
      if (tile.slack == nullptr)
        count_exact(tile, slot, allowed);
      else
        second_looks += count_rounded(tiles, tile, slot, allowed);
    }
    return second_looks;
  }

  int64_t rank(int64_t query, int64_t slot) const { return positives_[at(query, slot)].rank; }

 private:
  int64_t at(int64_t query, int64_t slot) const {
    return (query / width_ * slots_ + slot) * width_ + query % width_;
  }

  void count_exact(const ScoreTile& tile, int64_t slot, const uint32_t* allowed) {
    const ScoreKernels& kernels = score_kernels();
    uint32_t above[kMostQueries], equal[kMostQueries];
    const int64_t base = at(tile.first_query, slot);
    kernels.above(tile.scores, tile.num_queries, limits_.data() + base, above);
    kernels.equal(tile.scores, tile.num_queries, limits_.data() + base, equal);
    for (int64_t i = 0; i < tile.num_queries; ++i) {
      Positive& positive = positives_[base + i];
      if (positive.column < 0 || (above[i] | equal[i]) == 0) continue;
      const uint32_t before = low_bits(positive.column - tile.first_column);
      const uint32_t better = positive.is_nan ? above[i] & before : above[i] | (equal[i] & before);
      positive.rank += std::popcount(better & allowed[i]);
    }
  }

  int64_t count_rounded(const ScoreTiles& tiles, const ScoreTile& tile, int64_t slot,
                        const uint32_t* allowed) {
    const ScoreKernels& kernels = score_kernels();
    float limits[kMostQueries];
    uint32_t possible[kMostQueries], certain[kMostQueries];
    const int64_t base = at(tile.first_query, slot);
    lower_limits(limits_.data() + base, tile.slack, tile.num_queries, limits);
    kernels.above(tile.scores, tile.num_queries, limits, possible);
    raise_limits(limits_.data() + base, tile.slack, tile.num_queries, limits);
    kernels.above(tile.scores, tile.num_queries, limits, certain);
    int64_t second_looks = 0;
    for (int64_t i = 0; i < tile.num_queries; ++i) {
      Positive& positive = positives_[base + i];
      if (positive.column < 0) continue;
      // Without a bound nothing is certain, not even what looks like NaN.
      if (positive.is_nan || !(tile.slack[i] < kNoBound)) certain[i] = 0;
      positive.rank += std::popcount(certain[i] & allowed[i]);
      for (uint32_t open = possible[i] & ~certain[i] & allowed[i]; open != 0; open &= open - 1) {
        const int64_t column = tile.first_column + std::countr_zero(open);
        const float score = tiles.score(tile.first_query + i, column);
        const float limit = limits_[base + i];
        const bool before = column < positive.column;
        const bool above = !(score <= limit);
        positive.rank += positive.is_nan ? above && before : above || (score == limit && before);
        ++second_looks;
      }
    }
    return second_looks;
  }

  // Tiles come with ascending columns, so what lies before one is done with.
  uint32_t excluded_bits(const ScoreTile& tile, int64_t query) {
    uint32_t bits = 0;
    auto& left = excluded_[query];
    while (!left.empty() && left.front().second < tile.first_column + tile.num_columns) {
      bits |= uint32_t{1} << (left.front().second - tile.first_column);
      left = left.subspan(1);
    }
    return bits;
  }

  int64_t width_, slots_;
  std::vector<std::span<const Column>> excluded_;
  std::vector<Positive> positives_;
  std::vector<float> limits_;
};

}  // namespace

Tensor similarity_rank_fwd(const Tensor& queries, const Tensor& gallery, const Tensor& labels,
                           const std::optional<Tensor>& query_ids,
                           const std::optional<Tensor>& gallery_ids) {
  ScoreTiles tiles(queries, gallery);
  const int64_t rows = tiles.num_queries(), columns = tiles.num_columns();
  STD_TORCH_CHECK(
      labels.scalar_type() == ScalarType::Long && labels.dim() == 2 && labels.size(0) == rows,
      "labels must be int64 [N, P]");
  const Tensor dense = torch::stable::contiguous(labels);
  const int64_t* label = static_cast<const int64_t*>(dense.const_data_ptr());
  const int64_t slots = labels.size(1);
  STD_TORCH_CHECK(
      std::all_of(label, label + rows * slots, [&](int64_t column) { return column < columns; }),
      "labels must be below the number of rows of the gallery");
  ExcludedPairs excluded(query_ids, gallery_ids, rows, columns);
  excluded.sort();
  Tensor ranks = torch::stable::new_zeros(dense, {rows, slots});
  if (columns == 0 || slots == 0) return ranks;
  int64_t* rank = static_cast<int64_t*>(ranks.mutable_data_ptr());
  Positives positives(std::min(tiles.block(), rows), slots);
  for (int64_t first = 0; first < rows; first += tiles.block()) {
    const int64_t count = std::min(tiles.block(), rows - first);
    tiles.start(first, count);
    positives.start(tiles, label, excluded, first, count);
    FirstLook look(count, slots);
    tiles.for_each([&](const ScoreTile& tile) { look.count(positives.count(tiles, tile)); },
                   [&](int64_t column) { return look.pays(column); });
    for (int64_t i = 0; i < count; ++i)
      for (int64_t slot = 0; slot < slots; ++slot)
        rank[(first + i) * slots + slot] = positives.rank(i, slot);
  }
  return ranks;
}

}  // namespace m3bind::cpu
