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
                 const Tensor& grad_y) override {
    if (grad_x.size(0) > 0) mm_out(rows_of(grad_x, first, count), panel, y_);
    if (grad_y.size(0) == 0) return;
    Tensor turned = panel;
    mm_add(grad_y, torch::stable::transpose(turned, 0, 1), rows_of(x_, first, count));
  }

 private:
  Tensor x_, y_, y_transposed_;
};

}  // namespace

std::unique_ptr<Products> float_products(const Tensor& x, const Tensor& y) {
  return std::make_unique<FloatProducts>(x, y);
}

#ifndef M3BIND_X86
bool bf16_products_available() { return false; }
std::unique_ptr<Products> bf16_products(const Tensor& x, const Tensor& y) {
  return float_products(x, y);
}
#endif

}  // namespace m3bind::cpu
