#include "feature_gradients.h"

#include <utility>
#include <vector>

#include "row_blocks.h"
#include "row_kernels.h"

namespace m3bind::cpu {
namespace {

float* row(const Tensor& t, int64_t i) {
  return static_cast<float*>(t.mutable_data_ptr()) + i * t.size(1);
}

// to[at(a).first] += a.grad * from[at(a).second] for all of them. A block of rows takes its own, in
// their order.
template <class F>
void add_rows(const Tensor& to, const FloatRows& from, const std::vector<Apart>& all, const F& at) {
  if (to.size(0) == 0) return;
  std::vector<std::vector<Apart>> of_block(blocks_of(to.size(0)));
  for (const Apart& a : all) of_block[at(a).first / kBlockRows].push_back(a);
  for_row_blocks(to.size(0), [&](int64_t begin, int64_t) {
    std::vector<float> space;
    for (const Apart& a : of_block[begin / kBlockRows]) {
      const auto [i, j] = at(a);
      row_kernels().add_multiple(row(to, i), from.read(j, 1, space), to.size(1), a.grad);
    }
  });
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
  add_rows(x_, tiling_.y(), apart.all(), [](const Apart& a) { return std::pair(a.row, a.col); });
  add_rows(y_, tiling_.x(), apart.all(), [](const Apart& a) { return std::pair(a.col, a.row); });
}

void FeatureGradients::multiply(double factor) {
  multiply_rows(x_, static_cast<float>(factor));
  multiply_rows(y_, static_cast<float>(factor));
}

}  // namespace m3bind::cpu
