// float32 products in blocks, on processors with AVX-512: nothing as large as a tile is copied or
// turned.
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "brgemm.h"
#include "products.h"
#include "row_blocks.h"
#include "space.h"
#include "turned_rows.h"

namespace m3bind::cpu {
namespace {

constexpr int64_t kStrip = 64;      // columns of a tile at a time, for its dot products
constexpr int64_t kDotDepth = 128;  // features at a time: long sums in float32 are inexact
constexpr int64_t kDepth = 256;     // summands at a time in the gradients

class BlockedProducts : public Products {
 public:
  BlockedProducts(const Tensor& x, const Tensor& y, int64_t width)
      : held_x_(x),
        held_y_(y),
        x_(static_cast<const float*>(x.const_data_ptr())),
        y_(static_cast<const float*>(y.const_data_ptr())),
        rows_(x.size(0)),
        cols_(y.size(0)),
        features_(x.size(1)),
        width_(width) {}

  void begin_rows(int64_t first, int64_t count, bool dots) override {
    // For rows that are the last, dots() turns what it reads.
    if (dots && y_turned_.empty() && first + count < rows_) turn_y();
    if (turned_grad_y_) turn_x(first, count);
  }

  void dots(const Tile& tile) override {
    Space<float> own(y_turned_.empty() ? kStrip * features_ : 0);
    over_parts(tile.col, tile.col + tile.cols, kStrip, [&](int64_t j, int64_t width) {
      const bool turned = !y_turned_.empty();
      if (!turned) turn(y_ + j * features_, features_, width, features_, own.data(), width);
      const float* strip = turned ? y_turned_.data() + j * features_ : own.data();
      over_parts(0, tile.rows, kBlockRows, [&](int64_t i, int64_t rows) {
        over_parts(0, features_, kDotDepth, [&](int64_t d, int64_t depth) {
          m3bind_brgemm_float(rows, width, depth, features_, width, tile.cols, d > 0,
                              x_ + (tile.row + i) * features_ + d, strip + d * width,
                              tile.data + i * tile.cols + (j - tile.col), false);
        });
      });
    });
  }

  void begin_gradients(const Tensor& grad_x, bool need_y, int64_t) override {
    grad_x_ = grad_x;
    if (!need_y) return;
    if (rows_ <= kTileRows)
      grad_y_ = torch::stable::new_empty(held_y_, {cols_, features_});
    else
      turned_grad_y_.emplace(held_y_, width_);
  }

  void take(const Tile& tile) override {
    if (turned_grad_y_) add_turned(tile);
    if (grad_y_) add_rows(tile);
  }

  void add_to_x(std::span<const Tile> tiles) override {
    if (grad_x_->size(0) == 0) return;
    const Tile& first = tiles.front();
    float* out = static_cast<float*>(grad_x_->mutable_data_ptr()) + first.row * features_;
    for_parts(first.rows, features_, [&](int64_t begin, int64_t end, int64_t d, int64_t width) {
      over_row_blocks(begin, end, [&](int64_t i, int64_t rows) {
        for (const Tile& tile : tiles)
          m3bind_brgemm_float(rows, width, tile.cols, tile.cols, features_, features_, tile.col > 0,
                              tile.data + i * tile.cols, y_ + tile.col * features_ + d,
                              out + i * features_ + d, false);
      });
    });
  }

  void give_back() override {
    y_turned_.resize(0);
    x_turned_.resize(0);
  }

  Tensor take_y() override { return turned_grad_y_ ? turned_grad_y_->turn_back() : *grad_y_; }

 private:
  // Of the gradient of y the transpose is summed, so that nothing as large as a tile is turned.
  void add_turned(const Tile& tile) {
    over_parts(0, tile.rows, kDepth, [&](int64_t i, int64_t depth) {
      m3bind_brgemm_float(features_, tile.cols, depth, kTileRows, tile.cols, tile.cols,
                          tile.row + i > 0, x_turned_.data() + i, tile.data + i * tile.cols,
                          turned_grad_y_->columns(tile), false);
    });
  }

  // The rows are so few that turning the tile costs less than turning x and the gradient.
  void add_rows(const Tile& tile) {
    Space<float> turned(tile.cols * tile.rows);
    turn(tile.data, tile.cols, tile.rows, tile.cols, turned.data(), tile.rows);
    float* out = static_cast<float*>(grad_y_->mutable_data_ptr()) + tile.col * features_;
    over_parts(0, tile.rows, kDepth, [&](int64_t i, int64_t depth) {
      m3bind_brgemm_float(tile.cols, features_, depth, tile.rows, features_, features_,
                          tile.row + i > 0, turned.data() + i, x_ + (tile.row + i) * features_, out,
                          false);
    });
  }

  void turn_y() {
    y_turned_.resize(cols_ * features_);
    torch::stable::parallel_for(0, (cols_ + kStrip - 1) / kStrip, 1,
                                [&](int64_t begin, int64_t end) {
                                  over_parts(begin * kStrip, std::min(cols_, end * kStrip), kStrip,
                                             [&](int64_t j, int64_t width) {
                                               turn(y_ + j * features_, features_, width, features_,
                                                    y_turned_.data() + j * features_, width);
                                             });
                                });
  }

  void turn_x(int64_t first, int64_t count) {
    x_turned_.resize(features_ * kTileRows);
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      turn(x_ + (first + begin) * features_, features_, end - begin, features_,
           x_turned_.data() + begin, kTileRows);
    });
  }

  Tensor held_x_, held_y_;
  const float *x_, *y_;
  int64_t rows_, cols_, features_, width_;
  Space<float> y_turned_;  // [features, columns of the strip], strip after strip; or none
  Space<float> x_turned_;  // [features, kTileRows], of the rows at hand
  std::optional<Tensor> grad_x_;
  std::optional<TurnedRows> turned_grad_y_;  // of many rows, ...
  std::optional<Tensor> grad_y_;             // or of few
};

}  // namespace

bool blocked_products_available() {
  return m3bind_brgemm_float != nullptr && capability().blocked_products;
}

std::unique_ptr<Products> blocked_products(const Tensor& x, const Tensor& y, int64_t width) {
  return std::make_unique<BlockedProducts>(x, y, width);
}

}  // namespace m3bind::cpu
