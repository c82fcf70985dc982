// The three matrix products of a contrastive operator, tile by tile, on float32 or on bfloat16
// operands.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <span>

#include "tile.h"

namespace m3bind::cpu {

using torch::stable::Tensor;

class Products {
 public:
  virtual ~Products() = default;

  // tile = x[its rows] @ y[its columns].T; by any thread.
  virtual void dots(const Tile& tile) = 0;

  // Before gradients: x's [N, D] (or no rows: not wanted), whether y's is wanted, how many tiles of
  // how many rows there are at a time.
  virtual void begin(const Tensor& grad_x, bool need_y, int64_t slots, int64_t rows) = 0;
  // Before the derivatives of rows [first, first + count).
  virtual void begin_rows(int64_t first, int64_t count) = 0;
  // Adds tile.T @ x[its rows] to the gradient of y, in ascending order of rows; by any thread.
  virtual void take(const Tile& tile) = 0;
  // grad_x[rows of the tiles] = all that were taken of these rows @ y; tiles from left to right.
  virtual void add_to_x(std::span<const Tile> tiles) = 0;
  // The gradient of y [M, D], float32. There is no tile after it: what else takes memory goes
  // before.
  virtual Tensor finish_y() = 0;

  // Whether the derivatives are taken as they are.
  virtual bool exact() const { return true; }
};

// Columns of a tile, of so many.
int64_t tile_cols(int64_t cols);

// x [N, D] and y [M, D] are float32 and contiguous. By the GEMMs of torch's BLAS, ...
std::unique_ptr<Products> float_products(const Tensor& x, const Tensor& y);
// ... or in blocks. Only where blocked_products_available().
std::unique_ptr<Products> blocked_products(const Tensor& x, const Tensor& y);
bool blocked_products_available();

// The same of bfloat16 rows, of which there must be some: the dots are as exact as in float32, the
// derivatives are rounded to bfloat16. Only where bf16_products_available().
std::unique_ptr<Products> bf16_products(const Tensor& x, const Tensor& y);
bool bf16_products_available();

}  // namespace m3bind::cpu
