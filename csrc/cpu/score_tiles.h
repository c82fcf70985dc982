// The score matrix of queries and a gallery, a tile at a time: nothing of it is kept.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rounded_kernels.h"
#include "score_kernels.h"

namespace m3bind::cpu {

using torch::stable::Tensor;

// The set that goes with row_kernels().
const ScoreKernels& score_kernels();
// What goes with it on a processor that has bfloat16 products, else nullptr.
const RoundedKernels* rounded_kernels();

// A matrix of features of any floating type and strides, read as float32.
class FeatureRows {
 public:
  explicit FeatureRows(const Tensor& features);

  int64_t rows() const { return rows_; }
  int64_t features() const { return features_; }

  // out[d * width + r] = row rows[r], feature d, for r < count; 0 for count <= r < width.
  void pack(const int64_t* rows, int64_t count, int64_t width, float* out) const;
  // A row, in place where it lies there as float32, else in `space`.
  const float* row(int64_t at, float* space) const;

 private:
  template <class T>
  void pack_as(const int64_t* rows, int64_t count, int64_t width, float* out) const;

  Tensor tensor_;
  int64_t rows_, features_, row_stride_, feature_stride_;
};

// The scores of `num_queries` queries and `num_columns` rows of the gallery, from the first of
// each: scores[i * score_kernels().columns + j]. Where `slack` is set, they are rounded, and the
// score may be slack[i] more or less; where that is not below kNoBound, it may be anything.
struct ScoreTile {
  int64_t first_query, num_queries;
  int64_t first_column, num_columns;
  const float* scores;
  const float* slack;
};

inline constexpr float kNoBound = 1e30f;

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
  // multiple of score_kernels().queries. Scores may be rounded where may_round(first column) says
  // so.
  template <class F, class G>
  void for_each(const F& f, const G& may_round) {
    const ScoreKernels& kernels = score_kernels();
    bool trusted = false;
    for (int64_t first = 0, count = 0; first < num_columns(); first += count) {
      const bool rounded = rounded_kernels() != nullptr && may_round(first);
      // The first rounded columns are few, to see whether it pays.
      count = std::min(rounded && !trusted ? trial_ : step_, num_columns() - first);
      trusted = rounded;
      if (rounded)
        round_gallery(first, count);
      else
        pack_gallery(first, count);
      const int64_t panels = (count + kernels.columns - 1) / kernels.columns;
      torch::stable::parallel_for(0, query_panels(), 1, [&](int64_t begin, int64_t end) {
        alignas(64) float scores[kLargestTile];
        float slack[kMostQueries];
        for (int64_t group = 0; group < panels; group += group_)
          for (int64_t i = begin; i < end; ++i)
            for (int64_t j = group; j < std::min(panels, group + group_); ++j) {
              const ScoreTile tile = {
                  i * kernels.queries,
                  std::min(kernels.queries, count_ - i * kernels.queries),
                  first + j * kernels.columns,
                  std::min(kernels.columns, count - j * kernels.columns),
                  scores,
                  rounded ? slack : nullptr,
              };
              if (rounded)
                rounded_scores(tile, j, scores, slack);
              else
                kernels.scores(packed_queries(tile.first_query),
                               packed_gallery_.data() + j * kernels.columns * gallery_.features(),
                               gallery_.features(), tile.num_queries, scores);
              f(tile);
            }
      });
    }
  }

  // The score of query `row` of the block and a column, the same bits as in the tiles that are not
  // rounded.
  float score(int64_t row, int64_t column) const {
    thread_local std::vector<float> space;
    space.resize(gallery_.features());
    return score_kernels().one(packed_queries(row), gallery_.row(column, space.data()),
                               gallery_.features());
  }

  // The scores of query `row` of the block and some columns, the same bits as in the tiles.
  void listed(int64_t row, const int64_t* columns, int64_t count, float* out) const;

 private:
  void pack_gallery(int64_t first, int64_t count);
  void round_queries(int64_t first, int64_t count);
  void round_gallery(int64_t first, int64_t count);
  void rounded_scores(const ScoreTile& tile, int64_t panel, float* scores, float* slack) const;
  int64_t pairs() const { return (gallery_.features() + 1) / 2; }
  int64_t query_panels() const {
    return (count_ + score_kernels().queries - 1) / score_kernels().queries;
  }
  const float* packed_queries(int64_t row) const {
    const int64_t width = score_kernels().queries;
    return packed_queries_.data() + row / width * width * queries_.features() + row % width;
  }

  // Of a row, and of what rounding takes from it.
  struct Norms {
    float whole = 0, lost = 0;
  };
  Norms round_panel(const FeatureRows& from, int64_t first, int64_t count, int64_t width,
                    uint32_t* out, Norms* each) const;

  FeatureRows queries_, gallery_;
  int64_t block_, step_, trial_, group_;
  int64_t count_ = 0;
  std::vector<float> packed_queries_, packed_gallery_;
  std::vector<uint32_t> rounded_queries_, rounded_gallery_;
  std::vector<Norms> query_norms_;  // of each query
  std::vector<Norms> panel_norms_;  // the largest of each panel of the gallery
};

}  // namespace m3bind::cpu
