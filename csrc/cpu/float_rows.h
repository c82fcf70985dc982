// Features of one call, wherever they are not the operand of a product.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace m3bind::cpu {

using torch::stable::Tensor;

// [N, D], contiguous, float32 or bfloat16: read as float32, without a copy of all of them.
class FloatRows {
 public:
  explicit FloatRows(const Tensor& t)
      : tensor_(t),
        rows_(t.size(0)),
        features_(t.size(1)),
        wide_(t.scalar_type() == torch::headeronly::ScalarType::Float) {}

  int64_t rows() const { return rows_; }
  int64_t features() const { return features_; }
  const Tensor& tensor() const { return tensor_; }

  // Rows [first, first + count), which may lie in `space`.
  const float* read(int64_t first, int64_t count, std::vector<float>& space) const;
  // f(row, its features) on rows [begin, end).
  template <class F>
  void for_rows(int64_t begin, int64_t end, const F& f) const {
    constexpr int64_t kAtOnce = 8;  // widened rows that stay in the first-level cache
    std::vector<float> space;
    for (int64_t first = begin; first < end; first += kAtOnce) {
      const int64_t count = std::min(kAtOnce, end - first);
      const float* rows = read(first, count, space);
      for (int64_t i = 0; i < count; ++i) f(first + i, rows + i * features_);
    }
  }
  // The sum of all rows [D], or of rows times weights [N].
  std::vector<double> sum(const std::vector<double>* weights = nullptr) const;
  // The dot product of every row with a vector [D].
  std::vector<double> dots(const std::vector<double>& with) const;
  // Uninitialised float32 [rows, D].
  Tensor new_rows(int64_t rows) const {
    return torch::stable::new_empty(tensor_, {rows, features_},
                                    torch::headeronly::ScalarType::Float);
  }

 private:
  Tensor tensor_;
  int64_t rows_, features_;
  bool wide_;
};

}  // namespace m3bind::cpu
