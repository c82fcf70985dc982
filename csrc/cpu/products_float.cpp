#include <optional>

#include "gemm.h"
#include "products.h"

namespace m3bind::cpu {
namespace {

class FloatProducts : public Products {
 public:
  FloatProducts(const Tensor& x, const Tensor& y)
      : x_(x), y_(y), y_transposed_(torch::stable::transpose(y_, 0, 1)) {}

  void dots(int64_t first, int64_t count, const Tensor& panel) override {
    mm_out(panel, rows_of(x_, first, count), y_transposed_);
  }

  void gradients(int64_t first, int64_t count, const Tensor& panel, const Tensor& grad_x,
                 bool need_y) override {
    if (grad_x.size(0) > 0) mm_out(rows_of(grad_x, first, count), panel, y_);
    if (!need_y) return;
    Tensor whole = panel;
    const Tensor turned = torch::stable::transpose(whole, 0, 1);
    const bool adding = grad_y_.has_value();
    if (!adding) grad_y_ = torch::stable::new_empty(y_, {y_.size(0), y_.size(1)});
    (adding ? mm_add : mm_out)(*grad_y_, turned, rows_of(x_, first, count));
  }

  Tensor take_grad_y() override {
    return grad_y_ ? *grad_y_ : torch::stable::new_zeros(y_, {y_.size(0), y_.size(1)});
  }

 private:
  Tensor x_, y_, y_transposed_;
  std::optional<Tensor> grad_y_;
};

}  // namespace

std::unique_ptr<Products> float_products(const Tensor& x, const Tensor& y) {
  return std::make_unique<FloatProducts>(x, y);
}

#ifndef M3BIND_X86
bool blocked_products_available() { return false; }
std::unique_ptr<Products> blocked_products(const Tensor& x, const Tensor& y) {
  return float_products(x, y);
}
bool bf16_products_available() { return false; }
std::unique_ptr<Products> bf16_products(const Tensor& x, const Tensor& y) {
  return float_products(x, y);
}
#endif

}  // namespace m3bind::cpu
