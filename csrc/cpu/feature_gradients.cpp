#include "feature_gradients.h"

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

FeatureGradients::FeatureGradients(Panels& panels, bool need_x, bool need_y)
    : panels_(panels),
      need_y_(need_y),
      x_(panels.x().new_rows(need_x ? panels.rows() : 0)),
      y_(panels.y().new_rows(0)) {}

void FeatureGradients::finish() {
  if (need_y_) y_ = panels_.take_grad_y();
}

void FeatureGradients::add(const std::vector<Apart>& apart) {
  std::vector<float> space;
  for (const Apart& a : apart) {
    add_row(x_, a.row, panels_.y(), a.col, a.grad, space);
    add_row(y_, a.col, panels_.x(), a.row, a.grad, space);
  }
}

void FeatureGradients::multiply(double factor) {
  multiply_rows(x_, static_cast<float>(factor));
  multiply_rows(y_, static_cast<float>(factor));
}

}  // namespace m3bind::cpu
