// float32 products in blocks, on processors with AVX-512: a tenth faster than the GEMMs of a whole
// panel where torch's BLAS is not written for the processor, and nothing of the size of an operand
// is allocated.
#include <algorithm>
#include <optional>

#include "brgemm.h"
#include "gemm.h"
#include "products.h"
#include "row_blocks.h"
#include "space.h"
#include "transpose.h"

namespace m3bind::cpu {
namespace {

constexpr int64_t kDotColumns = 64;    // columns of the panel at a time, for its dot products
constexpr int64_t kDotDepth = 128;     // features at a time: long sums in float32 are inexact
constexpr int64_t kGradColumns = 128;  // columns at a time for the gradient of their features
constexpr int64_t kDepth = 256;        // summands at a time in the gradients

// f(first, count) on every tile of `size`, in order.
template <class F>
void over_tiles(int64_t begin, int64_t end, int64_t size, const F& f) {
  for (int64_t first = begin; first < end; first += size) f(first, std::min(size, end - first));
}

void turn(const float* from, int64_t from_ld, int64_t rows, int64_t cols, float* to) {
  transpose(reinterpret_cast<const uint32_t*>(from), from_ld, rows, cols,
            reinterpret_cast<uint32_t*>(to), rows);
}

float* writable(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// No operand or result of a block has the panel's number of columns from row to row: torch keeps
// the code of every combination of sizes that it has met.
class BlockedProducts : public Products {
 public:
  BlockedProducts(const Tensor& x, const Tensor& y)
      : held_x_(x),
        held_y_(y),
        x_(static_cast<const float*>(x.const_data_ptr())),
        y_(static_cast<const float*>(y.const_data_ptr())),
        cols_(y.size(0)),
        features_(x.size(1)) {}

  void dots(int64_t first, int64_t count, const Tensor& panel) override {
    float* out = writable(panel);
    by_tiles(cols_, kDotColumns, [&](int64_t begin, int64_t end) {
      Space<float> turned(kDotColumns * features_), block(kBlockRows * kDotColumns);
      over_tiles(begin, end, kDotColumns, [&](int64_t j, int64_t width) {
        turn(y_ + j * features_, features_, width, features_, turned.data());
        over_tiles(0, count, kBlockRows, [&](int64_t i, int64_t rows) {
          over_tiles(0, features_, kDotDepth, [&](int64_t d, int64_t depth) {
            m3bind_brgemm_float(rows, width, depth, features_, width, width, d > 0,
                                x_ + (first + i) * features_ + d, turned.data() + d * width,
                                block.data(), false);
          });
          for (int64_t r = 0; r < rows; ++r)
            std::copy_n(block.data() + r * width, width, out + (i + r) * cols_ + j);
        });
      });
    });
  }

  void gradients(int64_t first, int64_t count, const Tensor& panel, const Tensor& grad_x,
                 bool need_y) override {
    if (grad_x.size(0) > 0) to_x(count, writable(panel), writable(grad_x) + first * features_);
    if (need_y) to_y(first, count, writable(panel));
  }

  Tensor take_grad_y() override {
    return adding_ ? *grad_y_ : torch::stable::new_zeros(held_y_, {cols_, features_});
  }

 private:
  // f(begin, end), of whole tiles, by torch's threads.
  template <class F>
  static void by_tiles(int64_t size, int64_t tile, const F& f) {
    torch::stable::parallel_for(0, (size + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
      f(begin * tile, std::min(size, end * tile));
    });
  }

  void to_x(int64_t count, const float* panel, float* out) {
    if (cols_ == 0) std::fill_n(out, count * features_, 0.0f);
    for_parts(count, features_, [&](int64_t begin, int64_t end, int64_t d, int64_t width) {
      Space<float> block(kBlockRows * kDepth);
      over_tiles(0, cols_, kDepth, [&](int64_t j, int64_t depth) {
        over_tiles(begin, end, kBlockRows, [&](int64_t i, int64_t rows) {
          for (int64_t r = 0; r < rows; ++r)
            std::copy_n(panel + (i + r) * cols_ + j, depth, block.data() + r * depth);
          m3bind_brgemm_float(rows, width, depth, depth, features_, features_, j > 0, block.data(),
                              y_ + j * features_ + d, out + i * features_ + d, false);
        });
      });
    });
  }

  void to_y(int64_t first, int64_t count, const float* panel) {
    if (!adding_) grad_y_ = torch::stable::new_empty(held_y_, {cols_, features_});
    float* out = writable(*grad_y_);
    by_tiles(cols_, kGradColumns, [&](int64_t begin, int64_t end) {
      Space<float> turned(kGradColumns * kDepth);
      over_tiles(begin, end, kGradColumns, [&](int64_t j, int64_t width) {
        over_tiles(0, count, kDepth, [&](int64_t i, int64_t depth) {
          turn(panel + i * cols_ + j, cols_, depth, width, turned.data());
          m3bind_brgemm_float(width, features_, depth, depth, features_, features_,
                              adding_ || i > 0, turned.data(), x_ + (first + i) * features_,
                              out + j * features_, false);
        });
      });
    });
    adding_ = true;
  }

  Tensor held_x_, held_y_;
  const float *x_, *y_;
  int64_t cols_, features_;
  std::optional<Tensor> grad_y_;
  bool adding_ = false;
};

}  // namespace

bool blocked_products_available() {
  return m3bind_brgemm_float != nullptr && capability().blocked_products;
}

std::unique_ptr<Products> blocked_products(const Tensor& x, const Tensor& y) {
  return std::make_unique<BlockedProducts>(x, y);
}

}  // namespace m3bind::cpu
