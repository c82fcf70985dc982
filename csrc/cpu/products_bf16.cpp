#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "bf16_pack.h"
#include "brgemm.h"
#include "gemm.h"
#include "products.h"
#include "row_blocks.h"
#include "row_kernels.h"
#include "space.h"
#include "transpose.h"

namespace m3bind::cpu {
namespace {

constexpr int64_t kTile = 256;  // columns at a time: with 64 rows, operands and result fit into L2
constexpr int64_t kWide = 32;   // the inner dimension is padded to this many zeros

void release() {
  if (m3bind_brgemm_release != nullptr) m3bind_brgemm_release(true);
}

int64_t padded(int64_t n) { return (n + kWide - 1) / kWide * kWide; }

class Bf16Products : public Products {
 public:
  Bf16Products(const Tensor& x, const Tensor& y)
      : x_(x),
        y_(y),
        cols_(y.size(0)),
        features_(x.size(1)),
        inner_(padded(features_)),
        tiles_((cols_ + kTile - 1) / kTile),
        x_rows_(wide_rows(x_, x_space_)),
        y_rows_(wide_rows(y_, y_space_)),
        y_turned_(cols_ * inner_ / 2) {
    // [inner / 2, columns of the tile] pairs, tile after tile
    over_tiles([&](int64_t first, int64_t width) {
      transpose(pairs_of(y_rows_ + first * inner_), inner_ / 2, width, inner_ / 2,
                y_turned_.data() + first * inner_ / 2, width);
    });
  }

  void dots(int64_t first, int64_t count, const Tensor& panel) override {
    float* out = static_cast<float*>(panel.mutable_data_ptr());
    torch::stable::parallel_for(0, blocks_of(count) * tiles_, 1, [&](int64_t begin, int64_t end) {
      Space<float> block(kBlockRows * kTile);  // as in BlockedProducts
      for (int64_t part = begin; part < end; ++part) {
        const int64_t i = part / tiles_ * kBlockRows, rows = std::min(kBlockRows, count - i);
        const int64_t j = part % tiles_ * kTile, width = std::min(kTile, cols_ - j);
        m3bind_brgemm_bf16(rows, width, inner_, inner_, width, width, false,
                           x_rows_ + (first + i) * inner_, y_turned_.data() + j * inner_ / 2,
                           block.data(), true);
        for (int64_t r = 0; r < rows; ++r)
          std::copy_n(block.data() + r * width, width, out + (i + r) * cols_ + j);
      }
      release();
    });
  }

  void gradients(int64_t first, int64_t count, const Tensor& panel, const Tensor& grad_x,
                 bool need_y) override {
    const int64_t inner = padded(count);
    round_panel(static_cast<const float*>(panel.const_data_ptr()), count, inner);
    if (grad_x.size(0) > 0)
      to_x(count, static_cast<float*>(grad_x.mutable_data_ptr()) + first * features_);
    if (need_y) to_y(first, count, inner);
  }

  bool exact() const override { return false; }

  Tensor take_grad_y() override {
    for (auto* done : {&y_turned_, &y_packed_, &x_turned_}) done->resize(0);
    for (auto* done : {&rounded_, &packed_}) done->resize(0);
    Tensor grad_y =
        torch::stable::new_empty(y_, {cols_, features_}, torch::headeronly::ScalarType::Float);
    float* out = static_cast<float*>(grad_y.mutable_data_ptr());
    over_tiles([&](int64_t first, int64_t width) {
      transpose(reinterpret_cast<const uint32_t*>(grad_y_turned_.data() + first * features_), width,
                features_, width, reinterpret_cast<uint32_t*>(out + first * features_), features_);
    });
    grad_y_turned_.resize(0);
    return grad_y;
  }

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
  static const uint32_t* pairs_of(const Bf16* row) {
    return reinterpret_cast<const uint32_t*>(row);
  }

  // f(first column, columns) on every tile.
  template <class F>
  void over_tiles(const F& f) const {
    torch::stable::parallel_for(0, tiles_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) f(t * kTile, std::min(kTile, cols_ - t * kTile));
      release();
    });
  }

  // The panel in bfloat16, tile after tile: rows [count, padded width] in rounded_, and packed
  // [padded count, width] in packed_.
  void round_panel(const float* panel, int64_t count, int64_t inner) {
    const int64_t wide = tiles_ * kTile;
    rounded_.resize(count * wide);
    packed_.resize(inner * wide);
    for_row_blocks(count, [&](int64_t begin, int64_t last) {
      for (int64_t j = 0; j < cols_; j += kTile) {
        const int64_t width = std::min(kTile, cols_ - j);
        Bf16* plain = rounded_.data() + j * count;
        Bf16* pairs = packed_.data() + j * inner;
        for (int64_t i = begin; i < last; i += 2) {
          const bool two = i + 1 < last;
          const float* from = panel + i * cols_ + j;
          round_pair(from, two ? from + cols_ : nullptr, width, plain + i * padded(width),
                     two ? plain + (i + 1) * padded(width) : nullptr, pairs + i * width);
        }
        for (int64_t i = begin; i < last; ++i)
          std::fill_n(plain + i * padded(width) + width, padded(width) - width, Bf16{0});
        if (const int64_t end = last + last % 2; end >= count)
          std::fill_n(pairs + end * width, (inner - end) * width, Bf16{0});
      }
    });
  }

  void to_x(int64_t count, float* out) {
    if (y_packed_.empty()) pack_y();
    for_parts(count, features_, [&](int64_t begin, int64_t end, int64_t d, int64_t width) {
      for (int64_t i = begin; i < end; i += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, end - i);
        for (int64_t j = 0; j < cols_; j += kTile) {
          const int64_t inner = padded(std::min(kTile, cols_ - j));
          m3bind_brgemm_bf16(rows, width, inner, inner, features_, features_, j > 0,
                             rounded_.data() + j * count + i * inner,
                             y_packed_.data() + j / 2 * features_ + d, out + i * features_ + d,
                             true);
        }
      }
      release();
    });
  }

  // grad_y is summed as its transpose, [features, columns of the tile]: so the panel's pairs of
  // rows are the packed operand, and nothing as large as the panel is transposed.
  void to_y(int64_t first, int64_t count, int64_t inner) {
    const bool add = !grad_y_turned_.empty();
    if (!add) grad_y_turned_.resize(cols_ * features_);
    turn_x(first, count, inner);
    over_tiles([&](int64_t j, int64_t width) {
      m3bind_brgemm_bf16(features_, width, inner, inner, width, width, add, x_turned_.data(),
                         packed_.data() + j * inner, grad_y_turned_.data() + j * features_, true);
    });
  }

  // x_turned_ [features, inner], as pairs of neighbours in a row
  void turn_x(int64_t first, int64_t count, int64_t inner) {
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

  void pack_y() {
    y_packed_.resize(tiles_ * kTile / 2 * features_);
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
  int64_t cols_, features_, inner_, tiles_;
  std::vector<Bf16> x_space_, y_space_;  // of padded rows, where there are any
  const Bf16 *x_rows_, *y_rows_;
  Space<uint32_t> y_turned_, y_packed_, x_turned_;  // pairs
  Space<Bf16> rounded_, packed_;
  Space<float> grad_y_turned_;
};

}  // namespace

std::unique_ptr<Products> bf16_products(const Tensor& x, const Tensor& y) {
  return std::make_unique<Bf16Products>(x, y);
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
