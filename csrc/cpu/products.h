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

  // Before the tiles of rows [first, first + count), from top to bottom: whether dots() follows.
  virtual void begin_rows(int64_t first, int64_t count, bool dots) = 0;
  // tile = x[its rows] @ y[its columns].T; by any thread.
  virtual void dots(const Tile& tile) = 0;

  // Before all gradients: x's [N, D] (or no rows: not wanted), whether y's is wanted, how many
  // tiles are in memory.
  virtual void begin_gradients(const Tensor& grad_x, bool need_y, int64_t slots) = 0;
  // Adds tile.T @ x[its rows] to the gradient of y; by any thread.
  virtual void take(const Tile& tile) = 0;
  // Adds tile @ y[its columns] to the rows of grad_x, of which a tile in the first column is the
  // first: all that were taken, from left to right.
  virtual void add_to_x(std::span<const Tile> tiles) = 0;
  // After a thread's last tile of several.
  virtual void end_of_thread() {}
  // After the last tile: gives back what memory nothing but tiles needs.
  virtual void give_back() = 0;
  // The gradient of y [M, D], float32, after give_back().
  virtual Tensor take_y() = 0;

  // Whether the derivatives are taken as they are.
  virtual bool exact() const { return true; }
};

// x [N, D] and y [M, D] are float32 and contiguous. By the GEMMs of torch's BLAS, ...
std::unique_ptr<Products> float_products(const Tensor& x, const Tensor& y);
// ... or in blocks, for tiles of `width` columns. Only where blocked_products_available().
std::unique_ptr<Products> blocked_products(const Tensor& x, const Tensor& y, int64_t width);
bool blocked_products_available();

// The same of bfloat16 rows, of which there must be some: the dots are as exact as in float32, the
// derivatives are rounded to bfloat16. Only where bf16_products_available().
std::unique_ptr<Products> bf16_products(const Tensor& x, const Tensor& y, int64_t width);
bool bf16_products_available();

}  // namespace m3bind::cpu
