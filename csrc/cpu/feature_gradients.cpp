#include "feature_gradients.h"

#include "row_blocks.h"
#include "row_kernels.h"

namespace m3bind::cpu {
namespace {

float* row(const Tensor& t, int64_t i) {
  return static_cast<float*>(t.mutable_data_ptr()) + i * t.size(1);
}

void add_row(const Tensor& to, int64_t i, const FloatRows& from, int64_t j, float factor,
             std::vector<float>& space) {
  if (to.size(0) > 0)
    row_kernels().add_multiple(row(to, i), from.read(j, 1, space), to.size(1), factor);
}

void multiply_rows(const Tensor& t, float factor) {
  for_row_blocks(t.size(0), [&](int64_t begin, int64_t end) {
    row_kernels().multiply(row(t, begin), (end - begin) * t.size(1), factor);
  });
}

}  // namespace

void AllApart::merge(std::span<const Tile> tiles) {
  for (const Tile& tile : tiles) {
    all_.insert(all_.end(), of(tile).begin(), of(tile).end());
    of(tile).clear();
  }
}

FeatureGradients::FeatureGradients(Tiling& tiling, bool need_x, bool need_y)
    : tiling_(tiling),
      need_y_(need_y),
      x_(tiling.x().new_rows(need_x ? tiling.rows() : 0)),
      y_(tiling.y().new_rows(0)) {
  tiling.products().begin_gradients(x_, need_y, tiling.slots());
}

void FeatureGradients::finish() {
  tiling_.give_back();
  if (need_y_) y_ = tiling_.products().take_y();
  // Without tiles nobody wrote them.
  if (tiling_.cols() == 0) torch::stable::zero_(x_);
  if (tiling_.rows() == 0) torch::stable::zero_(y_);
}

void FeatureGradients::add(const AllApart& apart) {
  std::vector<float> space;
  for (const Apart& a : apart.all()) {
    add_row(x_, a.row, tiling_.y(), a.col, a.grad, space);
    add_row(y_, a.col, tiling_.x(), a.row, a.grad, space);
  }
}

void FeatureGradients::multiply(double factor) {
  multiply_rows(x_, static_cast<float>(factor));
  multiply_rows(y_, static_cast<float>(factor));
}

}  // namespace m3bind::cpu
