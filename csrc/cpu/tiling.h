// The similarity matrix of one call, a few tiles of it at a time: its dot products, with the rules
// for pairs applied.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "float_rows.h"
#include "pair_rules.h"
#include "products.h"
#include "row_kernels.h"
#include "space.h"
#include "tile.h"

namespace m3bind::cpu {

inline constexpr double kLog2E = 1.4426950408889634;

// The one value of a tensor.
double read_scalar(const Tensor& t);

// Which tiles are in memory at a time.
enum class AtOnce {
  kFew,   // one for each of torch's threads
  kRows,  // all of the same rows
};

// x, y and scale of one call, contiguous. Where both are bfloat16 and the processor multiplies
// that, their products do; otherwise they are float32.
class Tiling {
 public:
  Tiling(const Tensor& x, const Tensor& y, const Tensor& logit_scale, PairRules rules,
         double margin, AtOnce at_once = AtOnce::kFew);
  // Dot products alone: scale 1, and no rules for pairs.
  Tiling(const Tensor& x, const Tensor& y) : Tiling(x, y, 1.0, PairRules(0), 0.0, AtOnce::kFew) {}

  // `kept` [R, M] is where a forward pass leaves the dot products of the first R rows, tile after
  // tile ...
  void keep_in(const Tensor& kept);
  // ... and a backward pass finds them.
  void take_from(const Tensor& kept);

  // f(tiles) on all tiles, those that are in memory at a time, which have the same rows: from top
  // to bottom, and from left to right.
  template <class F>
  void for_each(const F& f) {
    for (int64_t first = 0, count = 0; first < rows_; first += count) {
      count = std::min(kTileRows, (first < kept_rows_ ? kept_rows_ : rows_) - first);
      for (int64_t col = 0; col < cols_; col += slots_ * width_) {
        f(lay_out({first, count, col, std::min(slots_ * width_, cols_ - col)}));
        put_back();
      }
    }
  }
  // f(tile) on each, by torch's threads. Tiles are the same for any number of threads, and so is
  // what is added up over a tile, but for products by torch's BLAS.
  template <class F>
  void share(std::span<Tile> tiles, const F& f) {
    torch::stable::parallel_for(0, static_cast<int64_t>(tiles.size()), 1,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t t = begin; t < end; ++t) f(tiles[t]);
                                  products_->end_of_thread();
                                });
  }
  // Uninitialised tiles of these rows and columns, no more than slots(): first those of the first
  // column.
  std::span<Tile> lay_out(const Range& range);
  // After them: writes dot products of `kept` again where the rules wrote. for_each calls both.
  void put_back();

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  double scale() const { return scale_; }
  double margin() const { return margin_; }
  double unit() const { return unit_; }  // a tile holds dot products times this
  Factor factor() const { return factor_; }
  const FloatRows& x() const { return x_; }
  const FloatRows& y() const { return y_; }
  const PairRules& rules() const { return rules_; }
  Products& products() { return *products_; }

  int64_t slots() const { return slots_; }  // tiles in memory
  RowTotals row_totals(int64_t kinds = 1) const { return {rows_, slots_, kinds}; }
  // After the last tile: gives back what memory nothing but tiles needs.
  void give_back() {
    memory_.resize(0);
    products_->give_back();
  }

  // One shift, in base 2, with which no sum of a row or column overflows; not finite where an input
  // is not. Forward and backward use the same, so that the rounding of `logit - shift` cancels.
  float common_shift() const;
  // With the common shift, log2 of the smallest sum whose losses to underflow (at 2^-126) are below
  // float32's rounding.
  double smallest_log2_sum() const;

  // Computes the dot products of a tile, with -inf where a pair is left out. Calls masked(row,
  // column, value) on masked pairs. By any thread.
  template <class F>
  void compute(Tile& tile, const F& masked) {
    dots(tile);
    rules_.apply(tile, static_cast<float>(margin_ * unit_), masked);
  }
  void compute(Tile& tile) {
    compute(tile, [](int64_t, int64_t, float) {});
  }

  // What a value of a tile is as a logit, and times log2(e).
  double logit(float value) const { return log2_logit(value) / kLog2E; }
  double log2_logit(float value) const { return value * to_log2_logit_; }

 private:
  Tiling(const Tensor& x, const Tensor& y, double scale, PairRules rules, double margin,
         AtOnce at_once);
  Tiling(const Tensor& x, const Tensor& y, double scale, PairRules rules, double margin,
         AtOnce at_once, bool narrow);
  void choose_factor();
  void dots(const Tile& tile);

  Space<float> wide_x_, wide_y_;  // where x and y were neither multiplied as they are nor float32
  FloatRows x_, y_;
  std::unique_ptr<Products> products_;
  PairRules rules_;
  int64_t rows_, cols_, width_, slots_;
  double scale_, margin_, log2_longest_;
  double largest_log2_logit_ = 0;  // a bound
  double unit_ = 1, to_log2_logit_ = kLog2E;
  Factor factor_{};  // to_log2_logit_ in two parts, for the exponentials

  std::vector<Tile> tiles_;
  Space<float> memory_;  // of the tiles that are not kept
  std::optional<Tensor> kept_;
  float* kept_data_ = nullptr;
  bool filled_ = false;  // kept_ is there to be read
  int64_t kept_rows_ = 0;
  // What the rules overwrite in it, of each slot.
  std::vector<std::vector<std::pair<float*, float>>> to_put_back_;
};

}  // namespace m3bind::cpu
