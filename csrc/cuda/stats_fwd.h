// similarity_stats, forward: row and column statistics of the similarity matrix in one pass. What a
// tile leaves behind is told by `stats_fwd_kernel` in kernels/m3bind_kernels/stats_fwd.py.
#pragma once

#include "outgoing.h"

namespace m3bind::cuda {

struct StatsFwd {
  Sizes sizes;
  Numbers numbers;
  const float* factor;  // [1]: logits in base 2 are factor * (dot - margin * positive)
  float margin;
  float *row_parts, *col_parts;  // [planes, tiles of columns, rows], [planes, of rows, columns]
  int64_t row_plane, col_plane;  // elements from plane to plane
  int* far;                      // [tiles], 0: where the sums are not good
  // Of the first rows, what stays for the backward pass: see `Kept` in kept.py.
  int kept_rows;
  float* shifts;                         // by tile
  float *kept_row_sums, *kept_col_sums;  // [2, tiles of columns, kept rows], ...
  int64_t kept_row_stride;               // elements from tile to tile
  int64_t kept_row_plane, kept_col_plane;
};

// KEEP: whether anything stays.
template <bool CLASSES, bool MASKS, bool TOTALS, bool KEEP>
class StatsFwdTile {
  static_assert(!(KEEP && TOTALS));

 public:
  M3BIND_DEVICE StatsFwdTile(const StatsFwd& p, Tile tile, const Meeting& meeting,
                             const Outgoing& outgoing)
      : p_(p),
        tile_(tile),
        meeting_(meeting),
        outgoing_(outgoing),
        row_parts_(p.row_parts + int64_t{tile.col} * p.sizes.rows + tile.row * kTileRows),
        col_parts_(p.col_parts + int64_t{tile.row} * p.sizes.cols + tile.col * kTileCols),
        rows_(p.sizes.rows - tile.row * kTileRows),
        cols_(p.sizes.cols - tile.col * kTileCols) {}

  M3BIND_DEVICE void run(float (&dots)[128]) {
    if (KEEP && Lane().thread == 0) outgoing_.wait();
    const bool special = is_special<CLASSES, MASKS>(p_.numbers, p_.sizes, tile_);
    const float shift = tile_shift(dots, *p_.factor, special);
    if (KEEP) keep_shift(special || !stays() ? INFINITY : shift - kDigitsAbove);
    if (special)
      statistics(dots, shift,
                 PairRules<CLASSES, MASKS>(p_.numbers, p_.sizes, tile_, Lane(), meeting_));
    else
      statistics(dots, shift, NoRules());
  }

 private:
  template <class Rules>
  M3BIND_DEVICE void statistics(float (&dots)[128], float shift, const Rules& rules) {
    if (CLASSES && Rules::kAny) {
      sum(dots, rules, kPositives, [&](float& dot, const Pair& pair) {
        if (pair.positive) dot -= p_.margin;
        return Both{pair.positive ? dot : 0.0f, pair.positive ? dot : 0.0f};
      });
    } else if (CLASSES) {
      fill(kPositives, 0);
    }
    if (TOTALS) {
      sum(dots, rules, kTotals, [&](float dot, const Pair& pair) {
        const float found = pair.left_out ? 0.0f : dot;
        return Both{found, found};
      });
    }
    fill(kShift, shift);
    const float factor = *p_.factor;
    sum(dots, rules, kSum, [&](float dot, const Pair& pair) {
      const float power = pair.left_out ? 0.0f : power_of_two(fmaf(dot, factor, -shift));
      return Both{pair.not_in_row ? 0.0f : power, pair.not_in_col ? 0.0f : power, power * dot};
    });
  }

  struct Both {
    float in_row, in_col;
    float kept = 0;  // of which sums stay, too, where powers do
  };

  static constexpr int kShift = 0, kSum = 1, kPositives = 2, kTotals = CLASSES ? 3 : 2;
  // What is lost to underflow (at 2^-126) is below the rounding of sums above 2^-64. Rows or
  // columns far below the others, or left out, or a NaN, are for another kernel.
  static constexpr float kSmallest = 5.4e-20f;
  // Powers up to 1 are multiplied by 2^15, so that float16 holds more of the small ones.
  static constexpr float kDigitsAbove = 15, kAbove = 32768;

  // An integer above the highest logit, so that differences of shifts are exact. A negative margin
  // raises positives above what is there.
  M3BIND_DEVICE float tile_shift(const float (&dots)[128], float factor, bool special) {
    float own = dots[0];
    if (factor < 0) {
#pragma unroll
      for (int i = 1; i < 128; ++i) own = fminf(own, dots[i]);
    } else {
#pragma unroll
      for (int i = 1; i < 128; ++i) own = fmaxf(own, dots[i]);
    }
    const float raised = special ? fmaxf(-p_.margin * factor, 0.0f) : 0.0f;
    const float found = over_warpgroup(own * factor, meeting_, higher) + raised;
    return found == -INFINITY ? 0.0f : ceilf(found);
  }

  // Whether the tile can be kept, but for special pairs.
  M3BIND_DEVICE bool stays() const { return (tile_.row + 1) * kTileRows <= p_.kept_rows; }

  M3BIND_DEVICE void keep_shift(float shift) {
    if (Lane().thread == 0 && tile_.row * kTileRows < p_.kept_rows)
      p_.shifts[int64_t{tile_.row} * ceil_div(p_.sizes.cols, kTileCols) + tile_.col] = shift;
  }

  // Sums over rows and columns of what `f(dot, rules of the pair)` gives.
  template <class Rules, class F>
  M3BIND_DEVICE void sum(float (&dots)[128], const Rules& rules, int plane, const F& f) {
    float row_sums[kOwnRows] = {0, 0}, kept_row_sums[kOwnRows] = {0, 0};
    float kept_col_sums[kAllPieces];
    bool good = true;
    const bool keep = KEEP && !Rules::kAny && plane == kSum && stays();
    meeting_.sync();
    over_pieces<Rules::kAny ? 1 : kAllPieces>(dots, [&](int first, int place) {
      const Lane lane;
      const RowNumbers rows = rules.rows(lane);
      float own[kPiece], kept[kPiece], in_row[kOwnRows][kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        Pair pairs[kOwnRows] = {};
        rules.of_column(rows, lane.col(first + i), pairs);
        own[i] = kept[i] = 0;
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          const Both both = f(dots[at(r, place + i)], pairs[r]);
          row_sums[r] += both.in_row;
          own[i] += both.in_col;
          in_row[r][i] = both.in_row;
          kept_row_sums[r] += both.kept;
          kept[i] += both.kept;
        }
      }
      put_columns(meeting_, first, own);
      if (keep) {
        put_powers(first, in_row);
        kept_col_sums[place / kPiece] = over_warp(kept);
      }
    });
    if (keep) async_fence();
    column_totals(meeting_, [&](int col, float total) {
      if (put_col(plane, col, total)) good = good && total >= kSmallest;
      if (keep) keep_col(0, col, total);
    });
    if (keep && Lane().thread == 0) outgoing_.send(p_.sizes, tile_);
    const Lane lane;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const float total = row_sum(row_sums[r]);
      if (put_row(plane, lane.row(r), total)) good = good && total >= kSmallest;
      if (keep) {
        keep_row(0, lane.row(r), total);
        keep_row(1, lane.row(r), row_sum(kept_row_sums[r]));
      }
    }
    if (keep) {
      meeting_.sync();
#pragma unroll
      for (int i = 0; i < kAllPieces; ++i) put_column(meeting_, i * kPiece, kept_col_sums[i]);
      column_totals(meeting_, [&](int col, float total) { keep_col(1, col, total); });
    }
    if (plane == kSum && !good) {
      const int tiles_n = ceil_div(p_.sizes.rows, kTileRows);
      p_.far[index_of(tile_, tiles_n, ceil_div(p_.sizes.cols, kTileCols))] = 1;
    }
  }

  M3BIND_DEVICE void keep_row(int plane, int row, float total) {
    const int64_t first = tile_.col * p_.kept_row_stride + tile_.row * kTileRows;
    p_.kept_row_sums[plane * p_.kept_row_plane + first + row] = kAbove * total;
  }

  M3BIND_DEVICE void keep_col(int plane, int col, float total) {
    const int64_t first = int64_t{tile_.row} * p_.sizes.cols + tile_.col * kTileCols;
    p_.kept_col_sums[plane * p_.kept_col_plane + first + col] = kAbove * total;
  }

  M3BIND_DEVICE void put_powers(int first, const float (&powers)[kOwnRows][kPiece]) {
    uint32_t pairs[kPiece];
#pragma unroll
    for (int i = 0; i < kPiece; i += 2)
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r)
        pairs[i + r] = rounded_pair(kAbove * powers[r][i], kAbove * powers[r][i + 1]);
    outgoing_.put(first, pairs);
  }

  M3BIND_DEVICE void fill(int plane, float value) {
    const Lane lane;
    if (lane.thread < kTileRows) put_row(plane, lane.thread, value);
#pragma unroll
    for (int col = lane.thread; col < kTileCols; col += kWarpgroup) put_col(plane, col, value);
  }

  // Of a row or column of the tile; whether there is one.
  M3BIND_DEVICE bool put_row(int plane, int row, float value) {
    if (row >= rows_) return false;
    row_parts_[plane * p_.row_plane + row] = value;
    return true;
  }

  M3BIND_DEVICE bool put_col(int plane, int col, float value) {
    if (col >= cols_) return false;
    col_parts_[plane * p_.col_plane + col] = value;
    return true;
  }

  const StatsFwd& p_;
  Tile tile_;
  Meeting meeting_;
  Outgoing outgoing_;
  float *row_parts_, *col_parts_;
  int rows_, cols_;  // from the tile's first on
};

template <bool KEEP>
constexpr int kStatsFwdStages = KEEP ? 3 : 4;
template <bool KEEP>
constexpr int kStatsFwdShared =
    Ring<kStatsFwdStages<KEEP>>::kBytes + 2 * (KEEP * Outgoing::kBytes + Meeting::kBytes) +
    2 * kStatsFwdStages<KEEP> * sizeof(Barrier) + 1024;  // to align it

// `shared` is aligned to 1024 bytes; `powers` describes [kept rows, columns] float16.
template <class Half, bool CLASSES, bool MASKS, bool TOTALS, bool KEEP>
M3BIND_DEVICE void stats_fwd(const StatsFwd& p, const TensorMap* x, const TensorMap* y,
                             const TensorMap* powers, char* shared) {
  using Stages = Ring<kStatsFwdStages<KEEP>>;
  const int half = thread_index() / kWarpgroup;
  const Outgoing outgoing(shared + Stages::kBytes + half * Outgoing::kBytes, powers);
  char* meetings = shared + Stages::kBytes + KEEP * 2 * Outgoing::kBytes;
  const Meeting meeting(meetings, half);
  Barrier* barriers = reinterpret_cast<Barrier*>(meetings + 2 * Meeting::kBytes);
  over_tiles<Half>(
      Stages(shared, barriers, p.sizes), x, y, p.sizes, AllBlocks{p.sizes},
      [&](float (&dots)[128], Tile tile) {
        StatsFwdTile<CLASSES, MASKS, TOTALS, KEEP>(p, tile, meeting, outgoing).run(dots);
      });
  if (KEEP) copy_out_wait();  // before the block's memory goes
}

}  // namespace m3bind::cuda
