// The gradients of x and y, panel by panel.
#pragma once

#include <cstdint>
#include <vector>

#include "panel.h"

namespace m3bind::cpu {

// Derivatives that are not in the panel: those at lone positives are by far the largest of their
// row, and rounding them to 16 bit would double the error of the whole gradient.
struct Apart {
  int64_t row, col;
  float grad;
};

class FeatureGradients {
 public:
  FeatureGradients(Panels& panels, bool need_x, bool need_y);

  // Takes the derivatives that now lie in the panel.
  void take(int64_t first, int64_t count) { panels_.gradients(first, count, x_, need_y_); }
  // After the last panel: x and y are whole, and there is no other panel.
  void finish();
  void add(const std::vector<Apart>& apart);
  void multiply(double factor);

  // float32, [0, D] where it is not needed
  const Tensor& x() const { return x_; }
  const Tensor& y() const { return y_; }

 private:
  Panels& panels_;
  bool need_y_;
  Tensor x_, y_;
};

}  // namespace m3bind::cpu
