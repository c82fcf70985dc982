// The similarity matrix in tiles: as much of it as one thread's second-level cache holds from its
// dot products to its part of the gradient of y.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "row_kernels.h"

namespace m3bind::cpu {

// Rows and columns of the similarity matrix.
struct Range {
  int64_t row = 0, rows = 0, col = 0, cols = 0;
};

// A positive pair.
struct Positive {
  int64_t row, col;
  int bits;
  float dot;  // as the tile held it, less the margin
};

// Enough rows for GEMMs at full speed, and few enough for a tile to stay in the cache.
inline constexpr int64_t kTileRows = 512;

struct Tile : Range {
  float* data = nullptr;            // [rows, cols], contiguous
  int64_t slot = 0;                 // which of the tiles in memory
  std::vector<Positive> positives;  // row by row

  float& at(int64_t i, int64_t j) const { return data[(i - row) * cols + (j - col)]; }
};

// f(first row of the tile, rows, float sums [kinds * cols], 0 before) on blocks of kBlockRows rows:
// the sums of a block are added to `to`, `stride` numbers from kind to kind.
template <class F>
void sum_columns(const Tile& tile, double* to, const F& f, int64_t kinds = 1, int64_t stride = 0) {
  std::vector<float> sums(kinds * tile.cols);
  for (int64_t begin = 0; begin < tile.rows; begin += kBlockRows) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    f(begin, std::min(kBlockRows, tile.rows - begin), sums.data());
    for (int64_t kind = 0; kind < kinds; ++kind)
      for (int64_t j = 0; j < tile.cols; ++j) to[kind * stride + j] += sums[kind * tile.cols + j];
  }
}

// Sums along rows. Tiles of the same rows add to them side by side, each to its own, and these are
// added up in the order of the tiles.
class RowTotals {
 public:
  RowTotals(int64_t rows, int64_t slots, int64_t kinds)
      : rows_(rows), kinds_(kinds), totals_(kinds * rows), parts_(slots * kinds * kTileRows) {}

  // What `tile` adds to its rows, of one kind; 0 before.
  double* of(const Tile& tile, int64_t kind = 0) {
    return parts_.data() + (tile.slot * kinds_ + kind) * kTileRows;
  }
  // After all tiles that are in memory.
  template <class T>
  void merge(std::span<T> tiles) {
    for (const Tile& tile : tiles) {
      for (int64_t kind = 0; kind < kinds_; ++kind) {
        double* part = of(tile, kind);
        double* total = totals_.data() + kind * rows_ + tile.row;
        for (int64_t i = 0; i < tile.rows; ++i) total[i] += std::exchange(part[i], 0.0);
      }
    }
  }
  const std::vector<double>& totals() const { return totals_; }
  double sum() const {
    double out = 0;
    for (const double total : totals_) out += total;
    return out;
  }

 private:
  int64_t rows_, kinds_;
  std::vector<double> totals_, parts_;
};

}  // namespace m3bind::cpu
