// What a gradient loses when its panels of derivatives are rounded to bfloat16, given back as far
// as it can be told without a product of float32 matrices.
#pragma once

#include <cstdint>
#include <vector>

#include "block_columns.h"
#include "feature_gradients.h"
#include "panel.h"

namespace m3bind::cpu {

// Large derivatives are kept apart: they are few, and their rounding would be that of whole rows.
// Of the others, the sum of what is lost along each row goes to the mean of all y, and along each
// column to the mean of all x: derivatives that sum up to 0 cancel what features have in common,
// and their rounding would not. What is left is as small as the rounding of the result.
class RoundingLoss {
 public:
  // By the upstream gradients of rows and columns: a derivative is large beyond a share of both.
  RoundingLoss(const Panels& panels, const std::vector<double>& row_grads,
               const std::vector<double>& col_grads);

  // Looks at the derivatives in the panel, and takes the large ones out of it.
  void take(const Panels& panels, int64_t first, int64_t count);
  // Adds to the gradients, after the last panel.
  void give_back(const Panels& panels, FeatureGradients& gradients) const;

 private:
  std::vector<float> row_limit_, col_limit_;
  std::vector<double> row_lost_, col_lost_;
  std::vector<Apart> apart_;
  BlockColumns columns_;
};

}  // namespace m3bind::cpu
