// The three matrix products of a contrastive operator, on float32 or on bfloat16 operands.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>

namespace m3bind::cpu {

using torch::stable::Tensor;

class Products {
 public:
  virtual ~Products() = default;
  // panel [count, M] = x[first : first + count] @ y.T
  virtual void dots(int64_t first, int64_t count, const Tensor& panel) = 0;
  // grad_x[first : first + count] = panel @ y, passed over where grad_x has no rows; where need_y,
  // panel.T @ x[first : first + count] is added up.
  virtual void gradients(int64_t first, int64_t count, const Tensor& panel, const Tensor& grad_x,
                         bool need_y) = 0;
  // That sum [M, D], float32. There is no panel after it: what else takes memory goes before.
  virtual Tensor take_grad_y() = 0;
  // Whether gradients() takes the panel as it is.
  virtual bool exact() const { return true; }
};

// x [N, D] and y [M, D] are float32 and contiguous. By the GEMMs of torch's BLAS, ...
std::unique_ptr<Products> float_products(const Tensor& x, const Tensor& y);
// ... or in blocks. Only where blocked_products_available().
std::unique_ptr<Products> blocked_products(const Tensor& x, const Tensor& y);
bool blocked_products_available();

// The same of bfloat16 rows, of which there must be some: the dots are as exact as in float32, the
// panel of derivatives is rounded to bfloat16. Only where bf16_products_available().
std::unique_ptr<Products> bf16_products(const Tensor& x, const Tensor& y);
bool bf16_products_available();

}  // namespace m3bind::cpu
