// A panel of rows of the similarity matrix: its dot products by a library GEMM, with the rules for
// pairs applied.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "float_rows.h"
#include "gemm.h"
#include "pair_rules.h"
#include "products.h"
#include "row_blocks.h"
#include "row_kernels.h"
#include "space.h"

namespace m3bind::cpu {

inline constexpr double kLog2E = 1.4426950408889634;

// The one value of a tensor.
double read_scalar(const Tensor& t);

// x, y and scale of one call, contiguous, with a buffer for one panel. Where both are bfloat16 and
// the processor multiplies that, their products do; otherwise they are float32.
class Panels {
 public:
  Panels(const Tensor& x, const Tensor& y, const Tensor& logit_scale, PairRules rules,
         double margin);
  // Dot products alone: scale 1, and no rules for pairs.
  Panels(const Tensor& x, const Tensor& y) : Panels(x, y, 1.0, PairRules(0), 0.0) {}

  // `kept` [R, M] is where a forward pass leaves the dot products of the first R rows ...
  void keep_in(const Tensor& kept);
  // ... and a backward pass finds them.
  void take_from(const Tensor& kept);

  // f(first row, rows) on every panel; none is partly kept.
  template <class F>
  void for_each(const F& f) {
    for (int64_t first = 0, count = 0; first < rows_; first += count) {
      count = std::min(step_, (first < kept_rows_ ? kept_rows_ : rows_) - first);
      f(first, count);
      put_back();
    }
  }

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t step() const { return step_; }  // rows a panel
  double scale() const { return scale_; }
  double margin() const { return margin_; }
  double sign() const { return sign_; }  // a panel holds dot products times this
  Factor factor() const { return factor_; }
  const FloatRows& x() const { return x_; }
  const FloatRows& y() const { return y_; }

  // One shift, in base 2, with which no sum of a row or column overflows; not finite where an input
  // is not. Forward and backward use the same, so that the rounding of `logit - shift` cancels.
  float common_shift() const;
  // With the common shift, log2 of the smallest sum whose losses to underflow (at 2^-126) are below
  // float32's rounding.
  double smallest_log2_sum() const;

  // Computes the dot products of rows [first, first + count); they lie in data(), with -inf where a
  // pair is left out. Calls masked(row, column, value) on masked pairs.
  template <class F>
  void compute(int64_t first, int64_t count, const F& masked) {
    dots(first, count);
    rules_.apply(data_, cols_, first, count, static_cast<float>(margin_ * sign_), positives_,
                 masked);
  }
  // The positive pairs of the panel, row by row.
  const std::vector<Positive>& positives() const { return positives_; }
  const PairRules& rules() const { return rules_; }

  // What a value of the panel is as a logit, and times log2(e).
  double logit(float value) const { return value * std::abs(scale_); }
  double log2_logit(float value) const { return logit(value) * kLog2E; }

  float* data() const { return data_; }

  // What the derivatives that now lie in the panel make of x and y: see Products.
  void gradients(int64_t first, int64_t count, const Tensor& grad_x, bool need_y) {
    products_->gradients(first, count, panel_, grad_x, need_y);
  }
  Tensor take_grad_y() {
    buffer_.reset();
    memory_.resize(0);
    return products_->take_grad_y();
  }
  bool exact() const { return products_->exact(); }

 private:
  Panels(const Tensor& x, const Tensor& y, double scale, PairRules rules, double margin);
  Panels(const Tensor& x, const Tensor& y, double scale, PairRules rules, double margin,
         bool narrow);
  void dots(int64_t first, int64_t count);
  void use(const Tensor& memory, int64_t first, int64_t count);
  void put_back();

  FloatRows x_, y_;
  Space<float> memory_;  // of the buffer
  std::optional<Tensor> buffer_, kept_;
  bool filled_ = false;  // kept_ is there to be read
  int64_t kept_rows_ = 0;
  Tensor panel_;
  float* data_ = nullptr;
  std::vector<std::pair<float*, float>> to_put_back_;  // what the rules overwrite in kept_
  std::unique_ptr<Products> products_;
  PairRules rules_;
  std::vector<Positive> positives_;
  int64_t rows_, cols_, step_;
  double scale_, margin_, log2_longest_;
  double sign_;
  Factor factor_;
};

}  // namespace m3bind::cpu
