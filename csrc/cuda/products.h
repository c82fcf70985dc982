// Dot products of rows of x and y, tile by tile: one warp brings features into shared memory, two
// warpgroups multiply, each 64 rows of x by 256 of y, and do with the result what they like.
#pragma once

#include "machine.h"

namespace m3bind::cuda {

constexpr int kBlockRows = 128;  // of x, half of them for each warpgroup
constexpr int kTileRows = 64;
constexpr int kTileCols = 256;
constexpr int kDepth = 64;  // features at a time: 128 bytes
constexpr int kThreads = 384;
constexpr int kWarpgroup = 128;
constexpr int kGroup = 8;  // tiles of rows that take their turns together, so that L2 serves them

constexpr int kDepthBytes = 2 * kDepth;
constexpr int kXBytes = kBlockRows * kDepthBytes;
constexpr int kStageBytes = kXBytes + kTileCols * kDepthBytes;

struct Sizes {
  int rows, cols, features;
};

M3BIND_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Tile {
  int row, col;
};

// The order of `tile_at` in kernels/m3bind_kernels/tiles.py, and its inverse.
M3BIND_DEVICE Tile tile_at(int index, int tiles_n, int tiles_m) {
  const int first = index / (kGroup * tiles_m) * kGroup;
  const int size = tiles_n - first < kGroup ? tiles_n - first : kGroup;
  const int inside = index % (kGroup * tiles_m);
  return {first + inside % size, inside / size};
}

M3BIND_DEVICE int index_of(Tile tile, int tiles_n, int tiles_m) {
  const int first = tile.row / kGroup * kGroup;
  const int size = tiles_n - first < kGroup ? tiles_n - first : kGroup;
  return first * tiles_m + tile.col * size + tile.row - first;
}

// The blocks of 128 x 256; computed when asked for, so that no register keeps them.
struct Blocks {
  int n, m;

  M3BIND_DEVICE explicit Blocks(const Sizes& sizes)
      : n(ceil_div(anew(sizes.rows), kBlockRows)), m(ceil_div(anew(sizes.cols), kTileCols)) {}

  M3BIND_DEVICE int count() const { return n * m; }  // the caller has seen to it that it fits
  M3BIND_DEVICE Tile at(int index) const { return tile_at(index, n, m); }
};

// Where 8 rows of 128 bytes follow each other, 16-byte pieces exchanged by the row's number, as the
// copy engine lays them out with CU_TENSOR_MAP_SWIZZLE_128B.
M3BIND_DEVICE uint64_t operand(const void* at) {
  constexpr uint64_t kEightRows = 8 * 128 >> 4, kSwizzle128 = 1;
  const uint64_t address = (shared_address(at) & 0x3ffff) >> 4;
  return address | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// A ring of stages in shared memory.
template <int STAGES>
class Ring {
 public:
  static constexpr int kBytes = STAGES * kStageBytes;

  struct Place {
    int stage = 0;
    uint32_t parity = 0;

    M3BIND_DEVICE void advance() {
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
  };

  // `stages` is aligned to 1024 bytes.
  M3BIND_DEVICE Ring(char* stages, Barrier* barriers, const Sizes& sizes)
      : stages_(stages),
        full_(barriers),
        empty_(barriers + STAGES),
        steps_(ceil_div(sizes.features, kDepth)) {}

  // By one thread, before all of the block meet.
  M3BIND_DEVICE void init() {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full_ + i, 1);
      barrier_init(empty_ + i, kWarps);
    }
    barrier_init_fence();
  }

  // By one thread: brings the features of a block of rows and a tile of columns.
  M3BIND_DEVICE void bring(Place& place, const TensorMap* x, const TensorMap* y, Tile block) {
#pragma unroll 1  // of few registers
    for (int k = 0; k < steps_; ++k, place.advance()) {
      barrier_wait(empty_ + place.stage, place.parity ^ 1);
      Barrier* full = full_ + place.stage;
      barrier_arrive_expecting(full, kStageBytes);
      char* to = stages_ + place.stage * kStageBytes;
      copy_in(to, x, k * kDepth, block.row * kBlockRows, full);
      copy_in(to + kXBytes, y, k * kDepth, block.col * kTileCols, full);
    }
  }

  // By warpgroup 0 or 1: the dot products of its half of the block, as `wgmma` hands them out.
  template <class Half>
  M3BIND_DEVICE void multiply(Place& place, int half, float (&dots)[128]) {
    // The second warpgroup runs behind the first one, as far as the ring reaches: for so long one
    // multiplies while the other works on what it has. Of few steps the first could come round
    // twice.
    const bool behind = steps_ >= STAGES;
    if (behind && half == 1) named_sync(kBehind, 2 * kWarpgroup);
    int before = 0;
    for (int k = 0; k < steps_; ++k, place.advance()) {
      barrier_wait(full_ + place.stage, place.parity);
      const char* stage = stages_ + place.stage * kStageBytes;
      const char* x = stage + half * kTileRows * kDepthBytes;
      const char* y = stage + kXBytes;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i)
        wgmma<Half>(dots, operand(x + 32 * i), operand(y + 32 * i), k > 0 || i > 0);
      wgmma_commit();
      if (k > 0) {
        wgmma_wait<1>();
        release(before);
      }
      before = place.stage;
      if (behind && half == 0 && k == STAGES - 2) named_arrive(kBehind, 2 * kWarpgroup);
    }
    wgmma_wait<0>();
    wgmma_done(dots);
    release(before);
  }

 private:
  static constexpr int kWarps = 8;   // that multiply
  static constexpr int kBehind = 1;  // a named barrier

  M3BIND_DEVICE void release(int stage) {
    if (thread_index() % 32 == 0) barrier_arrive(empty_ + stage);
  }

  char* stages_;
  Barrier *full_, *empty_;
  int steps_;
};

// Goes over all blocks of a matrix, those of this block of threads.
struct AllBlocks {
  Sizes sizes;

  template <class F>
  M3BIND_DEVICE void operator()(const F& f) const {
    for (int i = block_index(); i < Blocks(sizes).count(); i += block_count())
      f([&] { return Blocks(sizes).at(i); });
  }
};

// `walk(f)` calls f for one block of 128 x 256 after the other, with a function that tells which.
// Its dot products are handed on to each warpgroup for its 64 rows, where there are any:
// `finish(dots, tile of 64 x 256)`. Threads that bring features have FEW registers, those that
// multiply MANY; together no more than all have at the start, 168 each.
template <class Half, int FEW = 24, int MANY = 240, int STAGES, class Walk, class Finish>
M3BIND_DEVICE void over_tiles(Ring<STAGES> ring, const TensorMap* x, const TensorMap* y,
                              const Sizes& sizes, const Walk& walk, const Finish& finish) {
  static_assert(FEW + 2 * MANY <= 3 * 168);
  if (thread_index() == 0) ring.init();
  block_sync();
  typename Ring<STAGES>::Place place;
  if (thread_index() >= 2 * kWarpgroup) {
    fewer_registers<FEW>();
    if (thread_index() == 2 * kWarpgroup)
      walk([&](const auto& which) { ring.bring(place, x, y, which()); });
  } else {
    more_registers<MANY>();
    const int half = thread_index() / kWarpgroup;
    float dots[128];
    walk([&](const auto& which) {
      ring.template multiply<Half>(place, half, dots);
      const Tile block = which(), tile{2 * block.row + half, block.col};
      if (tile.row * kTileRows < sizes.rows) finish(dots, tile);
    });
  }
}

}  // namespace m3bind::cuda
