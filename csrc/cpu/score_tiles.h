// The score matrix of queries and a gallery, a tile at a time: nothing of it is kept.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "score_kernels.h"

namespace m3bind::cpu {

using torch::stable::Tensor;

// The set that goes with row_kernels().
const ScoreKernels& score_kernels();

// A matrix of features of any floating type and strides, read as float32.
class FeatureRows {
 public:
  explicit FeatureRows(const Tensor& features);

  int64_t rows() const { return rows_; }
  int64_t features() const { return features_; }

  // out[d * width + r] = row rows[r], feature d, for r < count; 0 for count <= r < width.
  void pack(const int64_t* rows, int64_t count, int64_t width, float* out) const;

 private:
  template <class T>
  void pack_as(const int64_t* rows, int64_t count, int64_t width, float* out) const;

  Tensor tensor_;
  int64_t rows_, features_, row_stride_, feature_stride_;
};

// The scores of `num_queries` queries and `num_columns` rows of the gallery, from the first of
// each: scores[i * score_kernels().columns + j].
struct ScoreTile {
  int64_t first_query, num_queries;
  int64_t first_column, num_columns;
  const float* scores;
};

// Queries of one block against the whole gallery.
class ScoreTiles {
 public:
  ScoreTiles(const Tensor& queries, const Tensor& gallery);

  int64_t num_queries() const { return queries_.rows(); }
  int64_t num_columns() const { return gallery_.rows(); }
  int64_t block() const { return block_; }  // queries in one block, the last one may be shorter

  // Makes queries [first, first + count) the ones at hand.
  void start(int64_t first, int64_t count);

  // Calls f(tile) on every tile of the block, from several threads, but for one query always from
  // one, with ascending columns. A tile's first query is counted from the block's first, and is a
  // multiple of score_kernels().queries.
  template <class F>
  void for_each(const F& f) {
    const ScoreKernels& kernels = score_kernels();
    const int64_t features = gallery_.features();
    for (int64_t first = 0; first < num_columns(); first += step_) {
      const int64_t count = std::min(step_, num_columns() - first);
      pack_gallery(first, count);
      const int64_t panels = (count + kernels.columns - 1) / kernels.columns;
      torch::stable::parallel_for(0, query_panels(), 1, [&](int64_t begin, int64_t end) {
        alignas(64) float scores[kLargestTile];
        for (int64_t group = 0; group < panels; group += group_)
          for (int64_t i = begin; i < end; ++i)
            for (int64_t j = group; j < std::min(panels, group + group_); ++j) {
              const ScoreTile tile = {
                  i * kernels.queries,
                  std::min(kernels.queries, count_ - i * kernels.queries),
                  first + j * kernels.columns,
                  std::min(kernels.columns, count - j * kernels.columns),
                  scores,
              };
              kernels.scores(packed_queries(tile.first_query),
                             packed_gallery_.data() + j * kernels.columns * features, features,
                             tile.num_queries, scores);
              f(tile);
            }
      });
    }
  }

  // The scores of query `row` of the block and some columns, the same bits as in the tiles.
  void listed(int64_t row, const int64_t* columns, int64_t count, float* out) const;

 private:
  void pack_gallery(int64_t first, int64_t count);
  int64_t query_panels() const {
    return (count_ + score_kernels().queries - 1) / score_kernels().queries;
  }
  const float* packed_queries(int64_t row) const {
    const int64_t width = score_kernels().queries;
    return packed_queries_.data() + row / width * width * queries_.features() + row % width;
  }

  FeatureRows queries_, gallery_;
  int64_t block_, step_, group_;
  int64_t count_ = 0;
  std::vector<float> packed_queries_, packed_gallery_;
};

}  // namespace m3bind::cpu
