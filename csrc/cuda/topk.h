// similarity_topk: collects candidates beside the products of tiles, and keeps the best where they
// become many. Why it is exact is told in kernels/m3bind_kernels/topk.py.
#pragma once

#include <cmath>
#include <limits>

#include "tile.h"

namespace m3bind::cuda {

constexpr int kMostCapacity = 1024;

struct Topk {
  Sizes sizes;
  Numbers numbers;  // masks alone
  int64_t* keys;    // [rows, num_parts, capacity]: greater where the score is, or where it is equal
                    // and the column lower
  int num_parts, tiles_a_part;  // of the gallery
  int k, many, capacity;        // more keys than `many` are too many
};

// Below every candidate's key, and above every one but that of a NaN.
constexpr int64_t kNoKey = std::numeric_limits<int64_t>::min();
constexpr int64_t kHighestKey = std::numeric_limits<int64_t>::max();

// In the order of the scores: -0 equals 0, NaN is greater than infinity.
M3BIND_DEVICE int ordered(float score) {
  if (score != score) return 0x7fffffff;
  const int bits = bits_of(score == 0.0f ? 0.0f : score);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

M3BIND_DEVICE int64_t key_of(float score, int col) {
  const uint64_t high = static_cast<uint32_t>(ordered(score));
  return static_cast<int64_t>(high << 32 | (0xffffffffu - static_cast<uint32_t>(col)));
}

// The keys of the 16 rows that a warp has.
class Candidates {
 public:
  // `buffer` [kMostCapacity] of the warp, `counts` and `limits` [kTileRows] of the warpgroup.
  M3BIND_DEVICE Candidates(const Topk& p, int first_row, int part, int64_t* buffer, int* counts,
                           float* limits)
      : p_(p),
        lists_(p.keys + (int64_t{first_row} * p.num_parts + part) * p.capacity),
        buffer_(buffer),
        counts_(counts),
        limits_(limits) {}

  M3BIND_DEVICE void begin() const {
    const Lane lane;
    if (lane.place < 2) {
      counts_[lane.row(lane.place)] = 0;
      limits_[lane.row(lane.place)] = NAN;  // everything is above it
    }
    warp_sync();
  }

  M3BIND_DEVICE float limit(int row) const { return limits_[row]; }

  M3BIND_DEVICE void add(int row, float score, int col) const {
    list(row)[count_up(counts_ + row)] = key_of(score, col);
  }

  // By all threads of the warp: keeps the best of rows that have too many.
  M3BIND_DEVICE void tidy() const {
    warp_sync();
    const Lane lane;
    const int first = 16 * lane.warp, own = lane.thread % 32;
    uint32_t left = ballot(own < 16 && counts_[first + own % 16] > p_.many);
#pragma unroll 1
    while (left != 0) {
      const int row = first + lowest_bit(left);
      left &= left - 1;
      keep_best(row, counts_[row]);
    }
  }

  M3BIND_DEVICE void fill(int rows) const {
    warp_sync();
    const int first = 16 * Lane().warp;
    for (int row = first; row < first + 16 && row < rows; ++row)
      for (int i = counts_[row] + Lane().thread % 32; i < p_.capacity; i += 32)
        list(row)[i] = kNoKey;
  }

 private:
  M3BIND_DEVICE int64_t* list(int row) const {
    return lists_ + int64_t{row} * p_.num_parts * p_.capacity;
  }

  template <class T, class F>
  static M3BIND_DEVICE T over_warp(T own, const F& f) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) own = f(own, shuffle_xor(own, lanes));
    return own;
  }

  M3BIND_DEVICE void keep_best(int row, int count) const {
    const int lane = Lane().thread % 32;
    int64_t least = kHighestKey, most = kNoKey;
    for (int i = lane; i < count; i += 32) {
      const int64_t key = list(row)[i];
      buffer_[i] = key;
      least = key < least ? key : least;
      most = key > most ? key : most;
    }
    least = over_warp(least, [](int64_t a, int64_t b) { return a < b ? a : b; });
    most = over_warp(most, [](int64_t a, int64_t b) { return a > b ? a : b; });
    warp_sync();
    const int64_t bound = bound_of_best(least, most, count);
    int kept = 0;
    int64_t last = most;
    for (int first = 0; first < count; first += 32) {
      const bool here = first + lane < count;
      const int64_t key = here ? buffer_[first + lane] : kNoKey;
      const bool stays = here && key >= bound;
      const uint32_t all = ballot(stays);
      if (stays) {
        list(row)[kept + bits_in(all & ((1u << lane) - 1))] = key;
        last = key < last ? key : last;
      }
      kept += bits_in(all);
    }
    last = over_warp(last, [](int64_t a, int64_t b) { return a < b ? a : b; });
    if (lane == 0) {
      counts_[row] = kept;
      // As a score again; nothing but NaN is above infinity, and not even that is above NaN.
      const int order = static_cast<int>(last >> 32);
      limits_[row] =
          order == 0x7fffffff ? INFINITY : from_bits(order < 0 ? order ^ 0x7fffffff : order);
    }
    warp_sync();
  }

  // A number that exactly k keys in the buffer are not below; no two of them are equal.
  M3BIND_DEVICE int64_t bound_of_best(int64_t least, int64_t most, int count) const {
    if (p_.k == 1) return most;
    int64_t low = least, high = most;  // at least k are not below `low`, and fewer not below `high`
    while (static_cast<uint64_t>(high) - static_cast<uint64_t>(low) > 1) {
      const uint64_t half = (static_cast<uint64_t>(high) - static_cast<uint64_t>(low)) / 2;
      const int64_t middle = static_cast<int64_t>(static_cast<uint64_t>(low) + half);
      int found = 0;
      for (int i = Lane().thread % 32; i < count; i += 32) found += buffer_[i] >= middle;
      found = sum_over_warp(found);
      if (found == p_.k) return middle;
      (found > p_.k ? low : high) = middle;
    }
    return low;
  }

  const Topk& p_;
  int64_t *lists_, *buffer_;
  int* counts_;
  float* limits_;
};

// A tile's scores that are above their row's limit; usually there are none.
template <class Rules>
M3BIND_DEVICE void collect(Tile tile, float (&dots)[128], const Candidates& candidates,
                           const Rules& rules) {
  float limits[kOwnRows];
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r) limits[r] = candidates.limit(Lane().row(r));
  bool any = false;
#pragma unroll
  for (int c = 0; c < kOwnCols; ++c)
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) any |= !(dots[at(r, c)] <= limits[r]);
  if (ballot(any) == 0) return;
  over_pieces<1>(dots, [&](int first, int place) {
    const Lane lane;
    const RowNumbers rows = rules.rows(lane);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      Pair pairs[kOwnRows] = {};
      rules.of_column(rows, lane.col(first + i), pairs);
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        const float score = dots[at(r, place + i)];
        if (!(score <= limits[r]) && !pairs[r].left_out)
          candidates.add(lane.row(r), score, tile.col * kTileCols + lane.col(first + i));
      }
    }
  });
  candidates.tidy();
}

constexpr int kTopkStages = 3;
constexpr int kTopkWarps = 8;
constexpr int kTopkShared = Ring<kTopkStages>::kBytes + 2 * Meeting::kBytes +
                            kTopkWarps * kMostCapacity * sizeof(int64_t) +
                            2 * kTopkStages * sizeof(Barrier) + 1024;  // to align it

// Every item of work is a block of 128 rows with one part of the gallery. `shared` is aligned to
// 1024 bytes.
template <class Half, bool MASKS>
M3BIND_DEVICE void topk(const Topk& p, const TensorMap* x, const TensorMap* y, char* shared) {
  using Stages = Ring<kTopkStages>;
  char* meetings = shared + Stages::kBytes;
  int64_t* buffers = reinterpret_cast<int64_t*>(meetings + 2 * Meeting::kBytes);
  Barrier* barriers = reinterpret_cast<Barrier*>(buffers + kTopkWarps * kMostCapacity);
  const Meeting meeting(meetings, thread_index() / kWarpgroup);
  const auto end_of = [&](int part) {
    const int tiles = ceil_div(p.sizes.cols, kTileCols), end = (part + 1) * p.tiles_a_part;
    return end < tiles ? end : tiles;
  };
  over_tiles<Half, 40, 232>(
      Stages(shared, barriers, p.sizes), x, y, p.sizes,
      [&](const auto& f) {
        // Items that are worked on at the same time read the same part of the gallery.
        const int blocks = ceil_div(p.sizes.rows, kBlockRows);
        for (int item = block_index(); item < blocks * p.num_parts; item += block_count()) {
          const int block = item % blocks, part = item / blocks;
          for (int col = part * p.tiles_a_part; col < end_of(part); ++col)
            f([&] { return Tile{block, col}; });
        }
      },
      [&](float (&dots)[128], Tile tile) {
        const int part = tile.col / p.tiles_a_part, first_row = tile.row * kTileRows;
        const Candidates candidates(p, first_row, part,
                                    buffers + (thread_index() / 32 % kTopkWarps) * kMostCapacity,
                                    reinterpret_cast<int*>(meeting.cols), meeting.cols + kTileRows);
        if (tile.col == part * p.tiles_a_part) candidates.begin();
        if (is_special<false, MASKS>(p.numbers, p.sizes, tile))
          collect(tile, dots, candidates,
                  PairRules<false, MASKS>(p.numbers, p.sizes, tile, Lane(), meeting));
        else
          collect(tile, dots, candidates, NoRules());
        if (tile.col + 1 == end_of(part)) candidates.fill(p.sizes.rows - first_row);
      });
}

}  // namespace m3bind::cuda
