// The gradient of y as it is summed: of every tile's columns the transpose, where their rows will
// lie.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

#include "space.h"
#include "tile.h"
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
  // Uninitialised, of the shape of `like` [M, D], for tiles of `width` columns.
  TurnedRows(const Tensor& like, int64_t width)
      : width_(width),
        tensor_(torch::stable::new_empty(like, {like.size(0), like.size(1)},
                                         torch::headeronly::ScalarType::Float)),
        data_(static_cast<float*>(tensor_.mutable_data_ptr())) {}

  // [D, columns of the tile]
  float* columns(const Tile& tile) const { return data_ + tile.col * tensor_.size(1); }

  // Once: the tensor, its rows as they should be.
  Tensor turn_back() {
    const int64_t features = tensor_.size(1);
    const int64_t tiles = (tensor_.size(0) + width_ - 1) / width_;
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      Space<float> space(width_ * features);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t cols = std::min(width_, tensor_.size(0) - t * width_);
        float* rows = data_ + t * width_ * features;
        std::copy_n(rows, cols * features, space.data());
        turn(space.data(), cols, features, cols, rows, features);
      }
    });
    return tensor_;
  }

 private:
  int64_t width_;
  Tensor tensor_;
  float* data_;
};

}  // namespace m3bind::cpu
