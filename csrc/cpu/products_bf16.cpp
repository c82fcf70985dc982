#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "bf16_pack.h"
#include "brgemm.h"
#include "products.h"
#include "row_blocks.h"
#include "space.h"
#include "turned_rows.h"

namespace m3bind::cpu {
namespace {

constexpr int64_t kWide = 32;  // the inner dimension is padded to this many zeros

void release() {
  if (m3bind_brgemm_release != nullptr) m3bind_brgemm_release(true);
}

int64_t padded(int64_t n) { return (n + kWide - 1) / kWide * kWide; }

class Bf16Products : public Products {
 public:
  Bf16Products(const Tensor& x, const Tensor& y, int64_t width)
      : x_(x),
        y_(y),
        cols_(y.size(0)),
        features_(x.size(1)),
        inner_(padded(features_)),
        width_(width),
        x_rows_(wide_rows(x_, x_space_)),
        y_rows_(wide_rows(y_, y_space_)) {}

  void begin_rows(int64_t first, int64_t count, bool dots) override {
    if (dots && y_turned_.empty()) turn_y();
    if (grad_y_) turn_x(first, count);
  }

  void dots(const Tile& tile) override {
    over_row_blocks(0, tile.rows, [&](int64_t i, int64_t rows) {
      m3bind_brgemm_bf16(rows, tile.cols, inner_, inner_, tile.cols, tile.cols, false,
                         x_rows_ + (tile.row + i) * inner_,
                         y_turned_.data() + tile.col * inner_ / 2, tile.data + i * tile.cols, true);
    });
  }

  void begin_gradients(const Tensor& grad_x, bool need_y, int64_t slots) override {
    grad_x_ = grad_x;
    rounded_.resize(slots * kTileRows * padded(width_));
    packed_.resize(slots * kTileRows * width_);
    if (grad_x.size(0) > 0) pack_y();
    if (need_y) grad_y_.emplace(y_, width_);
  }

  // Of the gradient of y the transpose is summed: so the tile's pairs of rows are the packed
  // operand.
  void take(const Tile& tile) override {
    round(tile);
    if (!grad_y_) return;
    const int64_t inner = padded(tile.rows);
    m3bind_brgemm_bf16(features_, tile.cols, inner, inner, tile.cols, tile.cols, tile.row > 0,
                       x_turned_.data(), packed(tile), grad_y_->columns(tile), true);
  }

  void add_to_x(std::span<const Tile> tiles) override {
    if (grad_x_->size(0) == 0) return;
    const Tile& first = tiles.front();
    float* out = static_cast<float*>(grad_x_->mutable_data_ptr()) + first.row * features_;
    for_parts(first.rows, features_, [&](int64_t begin, int64_t end, int64_t d, int64_t width) {
      over_row_blocks(begin, end, [&](int64_t i, int64_t rows) {
        for (const Tile& tile : tiles) {
          const int64_t inner = padded(tile.cols);
          m3bind_brgemm_bf16(rows, width, inner, inner, features_, features_, tile.col > 0,
                             rounded(tile) + i * inner,
                             y_packed_.data() + tile.col / 2 * features_ + d,
                             out + i * features_ + d, true);
        }
      });
      release();
    });
  }

  void end_of_thread() override { release(); }

  bool exact() const override { return false; }

  void give_back() override {
    for (auto* done : {&y_turned_, &y_packed_, &x_turned_}) done->resize(0);
    for (auto* done : {&rounded_, &packed_}) done->resize(0);
  }

  Tensor take_y() override { return grad_y_->turn_back(); }

 private:
  // Rows [.., inner_] with zeros behind the features: the tensor's own where it has no need of any.
  const Bf16* wide_rows(const Tensor& t, std::vector<Bf16>& space) const {
    const Bf16* rows = static_cast<const Bf16*>(t.const_data_ptr());
    if (features_ == inner_) return rows;
    space.resize(t.size(0) * inner_);
    for (int64_t i = 0; i < t.size(0); ++i)
      std::copy_n(rows + i * features_, features_, space.data() + i * inner_);
    return space.data();
  }

  // f(first column, columns) on the columns of every tile.
  template <class F>
  void over_tiles(const F& f) const {
    const int64_t tiles = (cols_ + width_ - 1) / width_;
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) f(t * width_, std::min(width_, cols_ - t * width_));
    });
  }

  Bf16* rounded(const Tile& tile) {
    return rounded_.data() + tile.slot * kTileRows * padded(width_);
  }
  Bf16* packed(const Tile& tile) { return packed_.data() + tile.slot * kTileRows * width_; }

  // The tile in bfloat16: rows [rows, padded columns], and packed [padded rows, columns].
  void round(const Tile& tile) {
    const int64_t wide = padded(tile.cols);
    for (int64_t i = 0; i < tile.rows; i += 2) {
      const bool two = i + 1 < tile.rows;
      const float* from = tile.data + i * tile.cols;
      Bf16* row = rounded(tile) + i * wide;
      round_pair(from, two ? from + tile.cols : nullptr, tile.cols, row, two ? row + wide : nullptr,
                 packed(tile) + i * tile.cols);
    }
    if (wide > tile.cols)
      for (int64_t i = 0; i < tile.rows; ++i)
        std::fill_n(rounded(tile) + i * wide + tile.cols, wide - tile.cols, Bf16{0});
    const int64_t end = tile.rows + tile.rows % 2;
    std::fill_n(packed(tile) + end * tile.cols, (padded(tile.rows) - end) * tile.cols, Bf16{0});
  }

  // x_turned_ [features, padded count], as pairs of neighbours in a row
  void turn_x(int64_t first, int64_t count) {
    const int64_t inner = padded(count);
    x_turned_.resize(features_ * inner / 2);
    torch::stable::parallel_for(0, inner / kWide, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> pairs(kWide / 2 * features_);
      for (int64_t i = begin * kWide; i < end * kWide; i += kWide) {
        for (int64_t p = 0; p < kWide / 2; ++p)
          pack_pair(x_rows_ + first * inner_, i + 2 * p, count, pairs.data() + p * features_);
        transpose(pairs.data(), features_, kWide / 2, features_, x_turned_.data() + i / 2,
                  inner / 2);
      }
    });
  }

  // [inner / 2, columns of the tile] pairs, tile after tile
  void turn_y() {
    y_turned_.resize(cols_ * inner_ / 2);
    over_tiles([&](int64_t first, int64_t width) {
      transpose(reinterpret_cast<const uint32_t*>(y_rows_ + first * inner_), inner_ / 2, width,
                inner_ / 2, y_turned_.data() + first * inner_ / 2, width);
    });
  }

  void pack_y() {
    y_packed_.resize((cols_ + width_ - 1) / width_ * padded(width_) / 2 * features_);
    over_tiles([&](int64_t first, int64_t width) {
      for (int64_t j = first; j < first + padded(width); j += 2)
        pack_pair(y_rows_, j, cols_, y_packed_.data() + j / 2 * features_);
    });
  }

  // Rows i and i + 1 of `count` rows; zeros beyond them.
  void pack_pair(const Bf16* rows, int64_t i, int64_t count, uint32_t* pairs) const {
    if (i < count)
      interleave(rows + i * inner_, i + 1 < count ? rows + (i + 1) * inner_ : nullptr, features_,
                 pairs);
    else
      std::fill_n(pairs, features_, 0);
  }

  Tensor x_, y_;
  int64_t cols_, features_, inner_, width_;
  std::vector<Bf16> x_space_, y_space_;  // of padded rows, where there are any
  const Bf16 *x_rows_, *y_rows_;
  Space<uint32_t> y_turned_, y_packed_, x_turned_;  // pairs
  Space<Bf16> rounded_, packed_;
  std::optional<Tensor> grad_x_;
  std::optional<TurnedRows> grad_y_;
};

}  // namespace

std::unique_ptr<Products> bf16_products(const Tensor& x, const Tensor& y, int64_t width) {
  return std::make_unique<Bf16Products>(x, y, width);
}

bool bf16_products_available() {
  if (m3bind_brgemm_bf16 == nullptr || !capability().bf16_products) return false;
  // torch.backends.mkldnn.flags or ONEDNN_MAX_CPU_ISA may forbid it at any time.
  constexpr int64_t kColumns = 16;
  const uint32_t zeros[kWide / 2 * kColumns] = {};
  float out[kColumns];
  try {
    m3bind_brgemm_bf16(1, kColumns, kWide, kWide, kColumns, kColumns, false, zeros, zeros, out,
                       true);
    release();
    return true;
  } catch (...) {
    return false;
  }
}

}  // namespace m3bind::cpu
