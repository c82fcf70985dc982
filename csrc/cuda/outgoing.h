// Rounded derivatives of a tile on their way to memory.
#pragma once

#include "tile.h"

namespace m3bind::cuda {

// A tile of 64 rows on its way out: four boxes of 64 columns, as the copy engine takes them.
class Outgoing {
 public:
  static constexpr int kBoxCols = 64;
  static constexpr int kBoxBytes = kTileRows * 2 * kBoxCols;
  static constexpr int kBytes = kTileCols / kBoxCols * kBoxBytes;

  // `shared` is aligned to 1024 bytes.
  M3BIND_DEVICE Outgoing(char* shared, const TensorMap* map) : shared_(shared), map_(map) {}

  // By one thread: what left before has been read.
  M3BIND_DEVICE void wait() const { copy_out_wait_read(); }

  // A piece of 8 columns of each thread, rounded, before an `async_fence`: pairs[2 * (column / 2) +
  // row].
  M3BIND_DEVICE void put(int first, const uint32_t (&pairs)[kPiece]) const {
    const Lane lane;
    const int in_warp = lane.thread % 32, row = 16 * lane.warp + in_warp % 16;
#pragma unroll
    for (int i = 0; i < kPiece; i += 4) {
      const int col8 = first / 2 + i / 2 + in_warp / 16;  // which 8 columns
      char* box = shared_ + col8 / 8 * kBoxBytes;
      const uint32_t four[4] = {pairs[i], pairs[i + 1], pairs[i + 2], pairs[i + 3]};
      store_matrices(box + 128 * row + 16 * (col8 % 8 ^ row % 8), four);
    }
  }

  // By one thread, after all have put all columns.
  M3BIND_DEVICE void send(const Sizes& sizes, Tile tile) const {
#pragma unroll
    for (int col = 0; col < kTileCols; col += kBoxCols)
      if (tile.col * kTileCols + col < sizes.cols)
        copy_out(map_, tile.col * kTileCols + col, tile.row * kTileRows,
                 shared_ + col / kBoxCols * kBoxBytes);
    copy_out_commit();
  }

 private:
  char* shared_;
  const TensorMap* map_;
};

}  // namespace m3bind::cuda
