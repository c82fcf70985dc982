// The gradient of y as it is summed: of every tile's columns the transpose, where their rows will
// lie.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "products.h"
#include "space.h"
#include "transpose.h"

namespace m3bind::cpu {

using torch::stable::Tensor;

// to [cols, rows] = from [rows, cols] turned; `ld` elements from row to row.
inline void turn(const float* from, int64_t from_ld, int64_t rows, int64_t cols, float* to,
                 int64_t to_ld) {
  transpose(reinterpret_cast<const uint32_t*>(from), from_ld, rows, cols,
            reinterpret_cast<uint32_t*>(to), to_ld);
}

class TurnedRows {
 public:
  // Uninitialised, of the shape of `like` [M, D].
  explicit TurnedRows(const Tensor& like)
      : tensor_(torch::stable::new_empty(like, {like.size(0), like.size(1)},
                                         torch::headeronly::ScalarType::Float)),
        data_(static_cast<float*>(tensor_.mutable_data_ptr())) {}

  // [D, columns of the tile]
  float* columns(const Tile& tile) const { return data_ + tile.col * tensor_.size(1); }

  // The tensor, its rows as they should be.
  const Tensor& turn_back() const {
    const int64_t features = tensor_.size(1), width = tile_cols(tensor_.size(0));
    const int64_t tiles = (tensor_.size(0) + width - 1) / width;
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      Space<float> space(width * features);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t cols = std::min(width, tensor_.size(0) - t * width);
        float* rows = data_ + t * width * features;
        std::copy_n(rows, cols * features, space.data());
        turn(space.data(), cols, features, cols, rows, features);
      }
    });
    return tensor_;
  }

 private:
  Tensor tensor_;
  float* data_;
};

}  // namespace m3bind::cpu
