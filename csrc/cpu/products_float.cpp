#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "gemm.h"
#include "products.h"

namespace m3bind::cpu {
namespace {

class FloatProducts : public Products {
 public:
  FloatProducts(const Tensor& x, const Tensor& y) : x_(x), y_(y) {}

  void dots(const Tile& tile) override {
    Tensor columns = rows_of(y_, tile.col, tile.cols);
    mm_out(matrix(tile), rows_of(x_, tile.row, tile.rows), torch::stable::transpose(columns, 0, 1));
  }

  void begin_rows(int64_t, int64_t, bool) override {}

  void begin_gradients(const Tensor& grad_x, bool need_y, int64_t) override {
    grad_x_ = grad_x;
    if (need_y) grad_y_ = torch::stable::new_zeros(y_, {y_.size(0), y_.size(1)});
  }

  void take(const Tile& tile) override {
    if (!grad_y_) return;
    Tensor derivatives = matrix(tile);
    mm_add(rows_of(*grad_y_, tile.col, tile.cols), torch::stable::transpose(derivatives, 0, 1),
           rows_of(x_, tile.row, tile.rows));
  }

  void add_to_x(std::span<const Tile> tiles) override {
    if (grad_x_->size(0) == 0) return;
    for (const Tile& tile : tiles)
      (tile.col > 0 ? mm_add : mm_out)(rows_of(*grad_x_, tile.row, tile.rows), matrix(tile),
                                       rows_of(y_, tile.col, tile.cols));
  }

  void give_back() override {}

  Tensor take_y() override { return *grad_y_; }

 private:
  Tensor matrix(const Tile& tile) const {
    return torch::stable::from_blob(tile.data, {tile.rows, tile.cols}, {tile.cols, 1}, x_.device(),
                                    torch::headeronly::ScalarType::Float);
  }

  Tensor x_, y_;
  std::optional<Tensor> grad_x_, grad_y_;
};

}  // namespace

std::unique_ptr<Products> float_products(const Tensor& x, const Tensor& y) {
  return std::make_unique<FloatProducts>(x, y);
}

#ifndef M3BIND_X86
bool blocked_products_available() { return false; }
std::unique_ptr<Products> blocked_products(const Tensor& x, const Tensor& y, int64_t) {
  return float_products(x, y);
}
bool bf16_products_available() { return false; }
std::unique_ptr<Products> bf16_products(const Tensor& x, const Tensor& y, int64_t) {
  return float_products(x, y);
}
#endif

}  // namespace m3bind::cpu
