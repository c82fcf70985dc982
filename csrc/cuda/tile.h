// A tile of 64 x 256 numbers in the registers of a warpgroup, as `wgmma` hands them out: which rows
// and columns a thread has, sums over both, and which pairs have rules of their own.
#pragma once

#include "products.h"

namespace m3bind::cuda {

constexpr int kOwnRows = 2, kOwnCols = 64;  // of a thread

// The place of own row r and own column c among a thread's numbers.
M3BIND_DEVICE constexpr int at(int r, int c) { return c / 2 * 4 + 2 * r + c % 2; }

// Made anew wherever it is needed: what is computed of it would else be kept in registers.
struct Lane {
  int thread, warp, group, place;  // in the warpgroup; in the warp: 8 groups of 4

  M3BIND_DEVICE Lane()
      : thread(anew(thread_index() % kWarpgroup)),
        warp(thread / 32),
        group(thread % 32 / 4),
        place(thread % 4) {}

  M3BIND_DEVICE int row(int r) const { return 16 * warp + group + 8 * r; }
  M3BIND_DEVICE int col(int c) const { return c / 2 * 8 + 2 * place + c % 2; }
};

// Shared memory and barrier of one warpgroup.
struct Meeting {
  static constexpr int kBytes = 4 * (4 * kTileCols + 2 * (kTileCols + kTileRows));

  float* cols;  // [4][kTileCols]
  int barrier;

  M3BIND_DEVICE Meeting(char* shared, int half)
      : cols(reinterpret_cast<float*>(shared + half * kBytes)), barrier(2 + half) {}

  M3BIND_DEVICE int* rules() const { return reinterpret_cast<int*>(cols + 4 * kTileCols); }

  M3BIND_DEVICE void sync() const { named_sync(barrier, kWarpgroup); }
};

M3BIND_DEVICE float row_sum(float own) {
  own += shuffle_xor(own, 1);
  return own + shuffle_xor(own, 2);
}

M3BIND_DEVICE float higher(float a, float b) { return fmaxf(a, b); }  // without NaN

// `f` of the numbers of all threads of the warpgroup, on all of them.
template <class F>
M3BIND_DEVICE float over_warpgroup(float own, const Meeting& meeting, const F& f) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) own = f(own, shuffle_xor(own, lanes));
  const Lane lane;
  meeting.sync();
  if (lane.thread % 32 == 0) meeting.cols[lane.warp] = own;
  meeting.sync();
  own = meeting.cols[0];
#pragma unroll
  for (int warp = 1; warp < 4; ++warp) own = f(own, meeting.cols[warp]);
  return own;
}

// Own columns that are worked on at a time, so that what is computed of them fits the registers.
constexpr int kPiece = 8;

// One step of adding up over lanes: each keeps half of its numbers, and gives the others away.
template <int LEFT>
M3BIND_DEVICE void halve(float (&sums)[kPiece], bool upper, int lanes) {
#pragma unroll
  for (int i = 0; i < LEFT; ++i) {
    const float gives = upper ? sums[i] : sums[i + LEFT];
    const float keeps = upper ? sums[i + LEFT] : sums[i];
    sums[i] = keeps + shuffle_xor(gives, lanes);
  }
}

// The next numbers of a thread come to the front; after all pieces they are as before.
template <int COUNT>
M3BIND_DEVICE void turn(float (&dots)[128]) {
  float front[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) front[i] = dots[i];
#pragma unroll
  for (int i = 0; i < 128 - COUNT; ++i) dots[i] = dots[i + COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) dots[128 - COUNT + i] = front[i];
}

// `piece(first own column, place of its numbers)` for every piece, so many written out at once. A
// loop that is one keeps what is computed of a piece from filling the registers, and turns the
// numbers; written out, it takes fewer instructions.
template <int AT_ONCE, class Piece>
M3BIND_DEVICE void over_pieces(float (&dots)[128], const Piece& piece) {
  constexpr int kCols = AT_ONCE * kPiece;
#pragma unroll 1
  for (int first = 0; first < kOwnCols; first += kCols) {
#pragma unroll
    for (int place = 0; place < kCols; place += kPiece) piece(first + place, place);
    if (kCols < kOwnCols) turn<kOwnRows * kCols>(dots);
  }
}

constexpr int kAllPieces = kOwnCols / kPiece;

// Of a piece's sums over own rows those over a warp's, a column for each thread.
M3BIND_DEVICE float over_warp(float (&sums)[kPiece]) {
  const Lane lane;
  halve<kPiece / 2>(sums, lane.group & 4, 16);
  halve<kPiece / 4>(sums, lane.group & 2, 8);
  halve<kPiece / 8>(sums, lane.group & 1, 4);
  return sums[0];
}

// What `over_warp` found of the piece that begins with an own column, for `column_totals`.
M3BIND_DEVICE void put_column(const Meeting& meeting, int first, float found) {
  const Lane lane;
  meeting.cols[lane.warp * kTileCols + lane.col(first + lane.group)] = found;
}

M3BIND_DEVICE void put_columns(const Meeting& meeting, int first, float (&sums)[kPiece]) {
  put_column(meeting, first, over_warp(sums));
}

// After all threads have put all columns: `store(column, sum over all rows)`, by one thread for
// each.
template <class Store>
M3BIND_DEVICE void column_totals(const Meeting& meeting, const Store& store) {
  meeting.sync();
  const Lane lane;
#pragma unroll
  for (int col = lane.thread; col < kTileCols; col += kWarpgroup) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < 4; ++warp) sum += meeting.cols[warp * kTileCols + col];
    store(col, sum);
  }
}

// Classes and masks [rows or columns], and their extremes by tile [tiles, 2]; null where there are
// none.
struct Numbers {
  const int *row_class, *col_class, *row_mask, *col_mask;
  const int *row_class_ranges, *col_class_ranges, *row_mask_ranges, *col_mask_ranges;
};

M3BIND_DEVICE bool may_meet(const int* rows, const int* cols, Tile tile) {
  return rows[2 * tile.row] <= cols[2 * tile.col + 1] &&
         cols[2 * tile.col] <= rows[2 * tile.row + 1];
}

// Whether a tile can hold positives or masked pairs, or reaches beyond the matrix.
template <bool CLASSES, bool MASKS>
M3BIND_DEVICE bool is_special(const Numbers& numbers, const Sizes& sizes, Tile tile) {
  bool special = (tile.row + 1) * kTileRows > sizes.rows || (tile.col + 1) * kTileCols > sizes.cols;
  if (CLASSES) special |= may_meet(numbers.row_class_ranges, numbers.col_class_ranges, tile);
  if (MASKS) special |= may_meet(numbers.row_mask_ranges, numbers.col_mask_ranges, tile);
  return special;
}

// The rules of `pair_rules` in kernels/m3bind_kernels/tiles.py, for one pair.
struct Pair {
  bool left_out, positive, not_in_row, not_in_col;
};

// Classes and masks of a thread's own rows.
struct RowNumbers {
  int classes[kOwnRows], masks[kOwnRows];
};

// Of a tile without special pairs.
struct NoRules {
  static constexpr bool kAny = false;
  M3BIND_DEVICE RowNumbers rows(const Lane&) const { return {}; }
  M3BIND_DEVICE void of_column(const RowNumbers&, int, Pair (&)[kOwnRows]) const {}
};

// Those of a thread's own pairs, out of shared memory: registers are scarce. All threads of a
// warpgroup make it at once.
template <bool CLASSES, bool MASKS>
class PairRules {
 public:
  static constexpr bool kAny = true;

  M3BIND_DEVICE PairRules(const Numbers& numbers, const Sizes& sizes, Tile tile, const Lane& lane,
                          const Meeting& meeting)
      : found_(meeting.rules()) {
    meeting.sync();
#pragma unroll
    for (int at = lane.thread; at < kTileCols; at += kWarpgroup) {
      const int col = tile.col * kTileCols + at;
      put(at, numbers.col_class, numbers.col_mask, col, col < sizes.cols, -2);
    }
    const int row = tile.row * kTileRows + lane.thread;
    if (lane.thread < kTileRows)
      put(kTileCols + lane.thread, numbers.row_class, numbers.row_mask, row, row < sizes.rows, -1);
    meeting.sync();
  }

  M3BIND_DEVICE RowNumbers rows(const Lane& lane) const {
    RowNumbers rows;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      rows.classes[r] = class_of(kTileCols + lane.row(r));
      rows.masks[r] = mask_of(kTileCols + lane.row(r));
    }
    return rows;
  }

  // Of the pairs of own rows with a column of the tile.
  M3BIND_DEVICE void of_column(const RowNumbers& rows, int col, Pair (&pairs)[kOwnRows]) const {
    const int col_class = class_of(col), col_mask = mask_of(col);
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      Pair& pair = pairs[r];
      pair = {col_mask == kOutside || rows.masks[r] == kOutside, false, false, false};
      if (CLASSES) {
        pair.positive = rows.classes[r] == col_class;
        pair.not_in_row = pair.positive && (rows.classes[r] & 1) != 0;
        pair.not_in_col = pair.positive && (rows.classes[r] & 2) != 0;
      }
      if (MASKS) pair.left_out |= rows.masks[r] == col_mask && !pair.positive;
    }
  }

 private:
  static constexpr int kOutside = -3;
  static constexpr int kMasks = kTileCols + kTileRows;  // behind the classes

  M3BIND_DEVICE int class_of(int at) const { return CLASSES ? found_[at] : 0; }
  M3BIND_DEVICE int mask_of(int at) const { return found_[kMasks + at]; }

  // Numbers below 0 equal nothing.
  M3BIND_DEVICE void put(int at, const int* classes, const int* masks, int from, bool inside,
                         int missing) const {
    const int own_class = CLASSES && inside ? classes[from] : -1;
    const int own_mask = MASKS && inside ? masks[from] : -1;
    found_[at] = own_class < 0 ? missing : own_class;
    found_[kMasks + at] = !inside ? kOutside : own_mask < 0 ? missing : own_mask;
  }

  int* found_;
};

}  // namespace m3bind::cuda
