// similarity_stats, backward: the derivatives by the dot products, rounded to float16, of which
// library GEMMs make gradients. What a tile leaves behind is told by `stats_bwd_kernel` in
// kernels/m3bind_kernels/stats_bwd.py.
#pragma once

#include "outgoing.h"

namespace m3bind::cuda {

struct StatsBwd {
  Sizes sizes;
  Numbers numbers;
  const float* factor;  // [1]: logits in base 2 are factor * (dot - margin * positive)
  float margin;
  const float *row_shift_ranges, *col_shift_ranges;  // [tiles, 2]
  // [4, rows], [4, columns]: shift, weight, gradients of the positives' and of all dots
  const float *row_vectors, *col_vectors;
  int64_t row_stride, col_stride;
  float* scale_parts;          // [tiles]: sums of derivative * dot
  float *row_lost, *col_lost;  // [tiles of columns, rows], [of rows, columns]: lost in rounding
};

// APART: pairs that are in neither's log-sum-exp are left to the caller.
template <bool CLASSES, bool MASKS, bool TOTALS, bool APART>
class StatsBwdTile {
 public:
  // `vectors` [2][kTileCols] is shared memory.
  M3BIND_DEVICE StatsBwdTile(const StatsBwd& p, Tile tile, const Meeting& meeting, float* vectors,
                             const Outgoing& outgoing)
      : p_(p), tile_(tile), meeting_(meeting), vectors_(vectors), outgoing_(outgoing) {}

  M3BIND_DEVICE void run(float (&dots)[128]) {
    const float *rows = p_.row_shift_ranges + 2 * tile_.row,
                *cols = p_.col_shift_ranges + 2 * tile_.col;
    const float low = fminf(rows[0], cols[0]), high = fmaxf(rows[1], cols[1]);
    // Whether 2^(logit - high) serves all rows and columns: see `one_exponential` in
    // derivatives.py.
    const bool one = high - low <= 64.0f;
    if (Lane().thread == 0) outgoing_.wait();
    if (!one || is_special<CLASSES, MASKS>(p_.numbers, p_.sizes, tile_)) {
      const PairRules<CLASSES, MASKS> rules(p_.numbers, p_.sizes, tile_, Lane(), meeting_);
      any(dots, rules);
    } else {
      usual(dots, high);
    }
  }

 private:
  struct Derivative {
    float for_scale, stored;
  };

  enum Vector { kShift, kWeight, kPositives, kTotals };

  M3BIND_DEVICE float of_row(Vector which, int row) const {
    const int at = tile_.row * kTileRows + row;
    return at < p_.sizes.rows ? p_.row_vectors[which * p_.row_stride + at] : 0.0f;
  }

  M3BIND_DEVICE float of_col(Vector which, int col) const {
    const int at = tile_.col * kTileCols + col;
    return at < p_.sizes.cols ? p_.col_vectors[which * p_.col_stride + at] : 0.0f;
  }

  // One exponential a pair, none of them special.
  M3BIND_DEVICE void usual(float (&dots)[128], float high) {
    share([&](int col) { return of_col(kWeight, col) * power_of_two(high - of_col(kShift, col)); },
          [&](int col) { return TOTALS ? of_col(kTotals, col) : 0.0f; });
    float by_row[kOwnRows];
    [[maybe_unused]] float row_total[kOwnRows];
    const Lane lane;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const int row = lane.row(r);
      by_row[r] = of_row(kWeight, row) * power_of_two(high - of_row(kShift, row));
      row_total[r] = TOTALS ? of_row(kTotals, row) : 0.0f;
    }
    const float factor = *p_.factor;
    put<kAllPieces>(
        dots, [&](int, float by_col, [[maybe_unused]] float col_total, const auto& derive) {
#pragma unroll
          for (int r = 0; r < kOwnRows; ++r)
            derive(r, [&](float dot) {
              float grad = power_of_two(fmaf(dot, factor, -high)) * (by_row[r] + by_col);
              if (TOTALS) grad += row_total[r] + col_total;
              return Derivative{grad * dot, grad};
            });
        });
  }

  // Two exponentials a pair, and rules.
  M3BIND_DEVICE void any(float (&dots)[128], const PairRules<CLASSES, MASKS>& rules) {
    share([&](int col) { return of_col(kShift, col); },
          [&](int col) { return of_col(kWeight, col); });
    const float factor = *p_.factor;
    put<1>(dots, [&](int col, float col_shift, float col_weight, const auto& derive) {
      const Lane lane;
      Pair pairs[kOwnRows];
      rules.of_column(rules.rows(lane), col, pairs);
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        const int row = lane.row(r);
        const Pair& pair = pairs[r];
        derive(r, [&](float dot) {
          if (pair.positive) dot -= p_.margin;
          const float logit = dot * factor;
          const float in_row = power_of_two(logit - of_row(kShift, row)) * of_row(kWeight, row);
          const float in_col = power_of_two(logit - col_shift) * col_weight;
          float grad = pair.left_out || pair.not_in_row ? 0.0f : in_row;
          grad += pair.left_out || pair.not_in_col ? 0.0f : in_col;
          if (pair.positive) grad += of_row(kPositives, row) + of_col(kPositives, col);
          if (TOTALS && !pair.left_out) grad += of_row(kTotals, row) + of_col(kTotals, col);
          const bool apart = APART && pair.not_in_row && pair.not_in_col;
          return Derivative{grad * dot, apart ? 0.0f : grad};
        });
      }
    });
  }

  // Two numbers of each column, in shared memory.
  template <class First, class Second>
  M3BIND_DEVICE void share(const First& first, const Second& second) {
    meeting_.sync();
    const Lane lane;
#pragma unroll
    for (int col = lane.thread; col < kTileCols; col += kWarpgroup) {
      vectors_[col] = first(col);
      vectors_[kTileCols + col] = second(col);
    }
    meeting_.sync();
  }

  // Rounds the derivatives, sends them off, and adds up what is lost.
  template <int AT_ONCE, class Of>
  M3BIND_DEVICE void put(float (&dots)[128], const Of& of) {
    float by_scale = 0, row_lost[kOwnRows] = {0, 0};
    over_pieces<AT_ONCE>(dots, [&](int first, int place) {
      const Lane lane;
      float lost[kPiece];
      uint32_t pairs[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; i += 2) {
        float grad[kOwnRows][2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = lane.col(first + i + e);
          const auto derive = [&](int r, const auto& f) {
            const Derivative found = f(dots[at(r, place + i + e)]);
            by_scale += found.for_scale;
            grad[r][e] = found.stored;
          };
          of(col, vectors_[col], vectors_[kTileCols + col], derive);
          lost[i + e] = 0;
        }
#pragma unroll
        for (int r = 0; r < kOwnRows; ++r) {
          const uint32_t pair = rounded_pair(grad[r][0], grad[r][1]);
          const float left[2] = {grad[r][0] - low_of(pair), grad[r][1] - high_of(pair)};
          row_lost[r] += left[0] + left[1];
          lost[i] += left[0];
          lost[i + 1] += left[1];
          pairs[i + r] = pair;
        }
      }
      outgoing_.put(first, pairs);
      put_columns(meeting_, first, lost);
    });
    async_fence();
    column_totals(meeting_, [&](int col, float total) {
      const int at = tile_.col * kTileCols + col;
      if (at < p_.sizes.cols) p_.col_lost[int64_t{tile_.row} * p_.sizes.cols + at] = total;
    });
    const Lane lane;
    if (lane.thread == 0) outgoing_.send(p_.sizes, tile_);
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const float total = row_sum(row_lost[r]);
      const int row = tile_.row * kTileRows + lane.row(r);
      if (row < p_.sizes.rows) p_.row_lost[int64_t{tile_.col} * p_.sizes.rows + row] = total;
    }
    const float total = over_warpgroup(by_scale, meeting_, [](float a, float b) { return a + b; });
    const int tiles_n = ceil_div(p_.sizes.rows, kTileRows);
    if (lane.thread == 0)
      p_.scale_parts[index_of(tile_, tiles_n, ceil_div(p_.sizes.cols, kTileCols))] = total;
  }

  const StatsBwd& p_;
  Tile tile_;
  Meeting meeting_;
  float* vectors_;
  Outgoing outgoing_;
};

constexpr int kStatsBwdStages = 3;
constexpr int kVectorBytes = 2 * kTileCols * sizeof(float);
constexpr int kStatsBwdShared = Ring<kStatsBwdStages>::kBytes +
                                2 * (Outgoing::kBytes + Meeting::kBytes + kVectorBytes) +
                                2 * kStatsBwdStages * sizeof(Barrier) + 1024;  // to align it

// `shared` is aligned to 1024 bytes.
template <class Half, bool CLASSES, bool MASKS, bool TOTALS, bool APART>
M3BIND_DEVICE void stats_bwd(const StatsBwd& p, const TensorMap* x, const TensorMap* y,
                             const TensorMap* out, char* shared) {
  using Stages = Ring<kStatsBwdStages>;
  char* outgoing = shared + Stages::kBytes;
  char* meetings = outgoing + 2 * Outgoing::kBytes;
  char* vectors = meetings + 2 * Meeting::kBytes;
  Barrier* barriers = reinterpret_cast<Barrier*>(vectors + 2 * kVectorBytes);
  over_tiles<Half>(Stages(shared, barriers, p.sizes), x, y, p.sizes, AllBlocks{p.sizes},
                   [&](float (&dots)[128], Tile tile) {
                     const int half = tile.row % 2;
                     StatsBwdTile<CLASSES, MASKS, TOTALS, APART>(
                         p, tile, Meeting(meetings, half),
                         reinterpret_cast<float*>(vectors + half * kVectorBytes),
                         Outgoing(outgoing + half * Outgoing::kBytes, out))
                         .run(dots);
                   });
  copy_out_wait();  // before the block's memory goes
}

}  // namespace m3bind::cuda
