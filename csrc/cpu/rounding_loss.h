// What a gradient loses when its derivatives are rounded to bfloat16, given back as far
// as it can be told without a product of float32 matrices.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "feature_gradients.h"
#include "tiling.h"

namespace m3bind::cpu {

// Large derivatives are kept apart: they are few, and their rounding would be that of whole rows.
// Of the others, the sum of what is lost along each row goes to the mean of all y, and along each
// column to the mean of all x: derivatives that sum up to 0 cancel what features have in common,
// and their rounding would not. What is left is as small as the rounding of the result.
class RoundingLoss {
 public:
  // By the upstream gradients of rows and columns: a derivative is large beyond a share of both.
  RoundingLoss(const Tiling& tiling, const std::vector<double>& row_grads,
               const std::vector<double>& col_grads);

  // Looks at the derivatives in a tile, and takes the large ones out of it; by any thread.
  void take(const Tile& tile);
  // After all tiles that are in memory.
  void merge(std::span<const Tile> tiles);
  // Adds to the gradients, after the last tile.
  void give_back(const Tiling& tiling, FeatureGradients& gradients) const;

 private:
  std::vector<float> row_limit_, col_limit_;
  RowTotals row_lost_;
  std::vector<double> col_lost_;
  AllApart apart_;
};

}  // namespace m3bind::cpu
