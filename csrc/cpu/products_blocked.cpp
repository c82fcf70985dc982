// float32 products in blocks, on processors with AVX-512: a tenth faster than the GEMMs of a whole
// panel where torch's BLAS is not written for the processor, and nothing of the size of an operand
// is allocated.
#include <algorithm>

#include "brgemm.h"
#include "gemm.h"
#include "panel.h"
#include "products.h"
#include "space.h"
#include "transpose.h"

namespace m3bind::cpu {
namespace {

constexpr int64_t kDotColumns = 64;    // columns of the panel at a time, for its dot products
constexpr int64_t kGradColumns = 128;  // and for the gradient of their features
constexpr int64_t kDotDepth = 128;
constexpr int64_t kDepth = 256;  // summands at a time in the gradients

// f(first, count) on every tile of `size`, in order.
template <class F>
void over_tiles(int64_t begin, int64_t end, int64_t size, const F& f) {
  for (int64_t first = begin; first < end; first += size) f(first, std::min(size, end - first));
}

class BlockedProducts : public Products {
 public:
  BlockedProducts(const Tensor& x, const Tensor& y)
      : x_(x), y_(y), cols_(y.size(0)), features_(x.size(1)) {}

  void dots(int64_t first, int64_t count, const Tensor& panel) override {
    const float* x = row(x_, first);
    float* out = row(panel, 0);
    by_tiles(cols_, kDotColumns, [&](int64_t j, int64_t width, Space<float>& turned) {
      turned.resize(kDotColumns * features_);
      transpose_floats(row(y_, j), features_, width, features_, turned.data(), width);
      over_tiles(0, count, kBlockRows, [&](int64_t i, int64_t rows) {
        over_tiles(0, features_, kDotDepth, [&](int64_t d, int64_t depth) {
          m3bind_brgemm_float(rows, width, depth, features_, width, cols_, d > 0,
                              x + i * features_ + d, turned.data() + d * width, out + i * cols_ + j,
                              false);
        });
      });
    });
  }

  void gradients(int64_t first, int64_t count, const Tensor& panel, const Tensor& grad_x,
                 bool need_y) override {
    if (grad_x.size(0) > 0) to_x(count, row(panel, 0), row(grad_x, first));
    if (need_y) to_y(first, count, row(panel, 0));
  }

  Tensor take_grad_y() override {
    return adding_ ? *grad_y_ : torch::stable::new_zeros(y_, {cols_, features_});
  }

 private:
  static float* row(const Tensor& t, int64_t i) {
    return static_cast<float*>(t.mutable_data_ptr()) + i * t.size(1);
  }
  static void transpose_floats(const float* from, int64_t from_ld, int64_t rows, int64_t cols,
                               float* to, int64_t to_ld) {
    transpose(reinterpret_cast<const uint32_t*>(from), from_ld, rows, cols,
              reinterpret_cast<uint32_t*>(to), to_ld);
  }

  // f(first, count, the thread's space) on every tile, by torch's threads.
  template <class F>
  static void by_tiles(int64_t size, int64_t tile, const F& f) {
    torch::stable::parallel_for(0, (size + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
      Space<float> space;
      over_tiles(begin * tile, std::min(size, end * tile), tile,
                 [&](int64_t first, int64_t count) { f(first, count, space); });
      if (m3bind_brgemm_release != nullptr) m3bind_brgemm_release(false);
    });
  }

  void to_x(int64_t count, const float* panel, float* out) {
    if (cols_ == 0) std::fill_n(out, count * features_, 0.0f);
    const int64_t blocks = (count + kBlockRows - 1) / kBlockRows;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      Space<float> block(kBlockRows * kDepth);
      over_tiles(0, cols_, kDepth, [&](int64_t j, int64_t width) {
        over_tiles(begin * kBlockRows, std::min(count, end * kBlockRows), kBlockRows,
                   [&](int64_t i, int64_t rows) {
                     for (int64_t r = 0; r < rows; ++r)
                       std::copy_n(panel + (i + r) * cols_ + j, width, block.data() + r * width);
                     m3bind_brgemm_float(rows, features_, width, width, features_, features_, j > 0,
                                         block.data(), row(y_, j), out + i * features_, false);
                   });
      });
      if (m3bind_brgemm_release != nullptr) m3bind_brgemm_release(false);
    });
  }

  void to_y(int64_t first, int64_t count, const float* panel) {
    if (!adding_) grad_y_ = torch::stable::new_empty(y_, {cols_, features_});
    by_tiles(cols_, kGradColumns, [&](int64_t j, int64_t width, Space<float>& turned) {
      turned.resize(kGradColumns * kDepth);
      over_tiles(0, count, kDepth, [&](int64_t i, int64_t depth) {
        transpose_floats(panel + i * cols_ + j, cols_, depth, width, turned.data(), depth);
        m3bind_brgemm_float(width, features_, depth, depth, features_, features_, adding_ || i > 0,
                            turned.data(), row(x_, first + i), row(*grad_y_, j), false);
      });
    });
    adding_ = true;
  }

  Tensor x_, y_;
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
