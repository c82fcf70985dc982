// The gradients of x and y, tile by tile.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tiling.h"

namespace m3bind::cpu {

// Derivatives that are not in a tile: those at lone positives are by far the largest of their
// row, and rounding them to 16 bit would double the error of the whole gradient.
struct Apart {
  int64_t row, col;
  float grad;
};

// Those of all tiles, in the order of the tiles.
class AllApart {
 public:
  explicit AllApart(const Tiling& tiling) : of_slot_(tiling.slots()) {}
  // Where a tile adds its own; by any thread.
  std::vector<Apart>& of(const Tile& tile) { return of_slot_[tile.slot]; }
  // After all tiles that are in memory.
  void merge(std::span<const Tile> tiles);
  const std::vector<Apart>& all() const { return all_; }

 private:
  std::vector<std::vector<Apart>> of_slot_;
  std::vector<Apart> all_;
};

class FeatureGradients {
 public:
  FeatureGradients(Tiling& tiling, bool need_x, bool need_y);

  // Takes the derivatives that now lie in a tile; by any thread.
  void take(const Tile& tile) { tiling_.products().take(tile); }
  // After all tiles that are in memory.
  void merge(std::span<const Tile> tiles) { tiling_.products().add_to_x(tiles); }
  // After the last tile: x and y are whole, and there is no other.
  void finish();
  void add(const AllApart& apart);
  void multiply(double factor);

  // float32, [0, D] where it is not needed
  const Tensor& x() const { return x_; }
  const Tensor& y() const { return y_; }

 private:
  Tiling& tiling_;
  bool need_y_;
  Tensor x_, y_;
};

}  // namespace m3bind::cpu
