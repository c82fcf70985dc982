#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "similarity_stats.h"
#include "tiling.h"

namespace m3bind::cpu {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// What is gathered of the rows, or of the columns.
struct Side {
  std::vector<double> sum;        // of 2^(logit - shift), in base 2
  std::vector<float> shift;       // of each
  std::vector<double> positives;  // sum of their logits
  std::vector<double> surplus;    // what the sum over all pairs has too much: masked ones, margins
  std::vector<std::pair<int64_t, double>> late;  // (row, logit in base 2) to be added to the sum

  Side(int64_t count, float start)
      : sum(count), shift(count, start), positives(count), surplus(count) {}
};

struct Sums {
  Side rows, cols;
  RowTotals row_surplus;
  Sums(const Tiling& tiling, float shift)
      : rows(tiling.rows(), shift), cols(tiling.cols(), shift), row_surplus(tiling.row_totals()) {}

  // Computes a tile, and gathers what its masked pairs add; by any thread.
  void compute(Tiling& tiling, Tile& tile) {
    double* surplus = row_surplus.of(tile);
    tiling.compute(tile, [&](int64_t i, int64_t j, float value) {
      const double logit = tiling.logit(value);
      surplus[i - tile.row] += logit;
      cols.surplus[j] += logit;
    });
  }

  // After all tiles that are in memory: what their positives add.
  void merge(const Tiling& tiling, std::span<const Tile> tiles) {
    row_surplus.merge(tiles);
    for (const Tile& tile : tiles) {
      for (const Positive& p : tile.positives) {
        const double logit = tiling.logit(p.dot);
        rows.positives[p.row] += logit;
        cols.positives[p.col] += logit;
        rows.surplus[p.row] += tiling.scale() * tiling.margin();
        cols.surplus[p.col] += tiling.scale() * tiling.margin();
        // It was left out of both sums, though only one of them must not hold it.
        if (p.bits == kOneRow) rows.late.emplace_back(p.row, tiling.log2_logit(p.dot));
        if (p.bits == kOneColumn) cols.late.emplace_back(p.col, tiling.log2_logit(p.dot));
      }
    }
  }

  // After the last tile.
  void finish() {
    for (size_t i = 0; i < rows.surplus.size(); ++i) rows.surplus[i] += row_surplus.totals()[i];
  }
};

// One exponential a logit, with one shift for all of them.
Sums sum_with_common_shift(Tiling& tiling, float shift) {
  Sums sums(tiling, shift);
  RowTotals row_sums = tiling.row_totals();
  tiling.for_each([&](std::span<Tile> tiles) {
    tiling.share(tiles, [&](Tile& tile) {
      sums.compute(tiling, tile);
      sum_columns(tile, sums.cols.sum.data() + tile.col,
                  [&](int64_t begin, int64_t count, float* col_sums) {
                    row_kernels().sum_shifted(tile.data + begin * tile.cols, count, tile.cols,
                                              tiling.factor(), shift, row_sums.of(tile) + begin,
                                              col_sums);
                  });
    });
    row_sums.merge(tiles);
    sums.merge(tiling, tiles);
  });
  sums.finish();
  sums.rows.sum = row_sums.totals();
  return sums;
}

float finite(float shift) { return shift == kMinusInf ? 0.0f : shift; }

// Exponentials of one row (or column) in two parts become one.
void merge_shifted(double& sum, float& shift, double more, float own_shift) {
  // Before the first finite logit the sum is 0, or NaN, and has no shift to change.
  const auto down = [](float from, float to) {
    return from == kMinusInf ? 1.0 : std::exp2(static_cast<double>(from) - to);
  };
  const float largest = std::max(shift, own_shift), to = finite(largest);
  sum = sum * down(shift, to) + more * down(own_shift, to);
  shift = largest;
}

// Two exponentials a logit, each row and column shifted by its own maximum: for logits so far apart
// that the common shift loses a whole row or column to underflow.
Sums sum_with_own_shifts(Tiling& tiling) {
  Sums sums(tiling, kMinusInf);
  RowTotals row_sums = tiling.row_totals();
  std::vector<float> row_shifts(tiling.slots() * kTileRows);
  tiling.for_each([&](std::span<Tile> tiles) {
    tiling.share(tiles, [&](Tile& tile) {
      sums.compute(tiling, tile);
      float* row_max = row_shifts.data() + tile.slot * kTileRows;
      std::fill_n(row_max, tile.rows, kMinusInf);
      std::vector<float> col_max(tile.cols, kMinusInf), row_shift(tile.rows);
      row_kernels().maxima(tile.data, tile.rows, tile.cols, tiling.factor(), row_max,
                           col_max.data());
      for (int64_t j = 0; j < tile.cols; ++j) {
        float& shift = sums.cols.shift[tile.col + j];
        merge_shifted(sums.cols.sum[tile.col + j], shift, 0, col_max[j]);
        col_max[j] = finite(shift);
      }
      std::transform(row_max, row_max + tile.rows, row_shift.begin(), finite);
      sum_columns(tile, sums.cols.sum.data() + tile.col,
                  [&](int64_t begin, int64_t count, float* col_sums) {
                    row_kernels().sum_own_shift(tile.data + begin * tile.cols, count, tile.cols,
                                                tiling.factor(), row_shift.data() + begin,
                                                col_max.data(), row_sums.of(tile) + begin,
                                                col_sums);
                  });
    });
    for (const Tile& tile : tiles)
      for (int64_t i = 0; i < tile.rows; ++i)
        merge_shifted(sums.rows.sum[tile.row + i], sums.rows.shift[tile.row + i],
                      std::exchange(row_sums.of(tile)[i], 0.0),
                      row_shifts[tile.slot * kTileRows + i]);
    sums.merge(tiling, tiles);
  });
  sums.finish();
  for (Side* side : {&sums.rows, &sums.cols})
    std::transform(side->shift.begin(), side->shift.end(), side->shift.begin(), finite);
  return sums;
}

// log2(2^a + 2^b)
double add_exponentials(double a, double b) {
  const double high = std::max(a, b), low = std::min(a, b);
  return low == -std::numeric_limits<double>::infinity()
             ? high
             : high + std::log2(1 + std::exp2(low - high));
}

Tensor statistics(const Tiling& tiling, const Side& side, const FloatRows& own,
                  const FloatRows& others, bool totals) {
  const int64_t count = static_cast<int64_t>(side.sum.size());
  Tensor out = torch::stable::new_zeros(tiling.x().tensor(), {3, count},
                                        torch::headeronly::ScalarType::Double);
  double* lse = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) lse[i] = std::log2(side.sum[i]) + side.shift[i];
  for (const auto& [i, logit] : side.late) lse[i] = add_exponentials(lse[i], logit);
  for (int64_t i = 0; i < count; ++i) lse[i] /= kLog2E;
  std::copy(side.positives.begin(), side.positives.end(), lse + count);
  if (!totals) return out;
  const std::vector<double> dots = own.dots(others.sum());
  for (int64_t i = 0; i < count; ++i)
    lse[2 * count + i] = tiling.scale() * dots[i] - side.surplus[i];
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> statistics(Tiling& tiling, bool totals) {
  const float shift = tiling.common_shift();
  const auto result = [&](const Sums& sums) {
    return std::tuple(statistics(tiling, sums.rows, tiling.x(), tiling.y(), totals),
                      statistics(tiling, sums.cols, tiling.y(), tiling.x(), totals));
  };
  if (std::isfinite(shift)) {
    const Sums sums = sum_with_common_shift(tiling, shift);
    const double smallest = std::exp2(tiling.smallest_log2_sum());
    const auto enough = [&](double sum) { return sum >= smallest; };
    if (std::all_of(sums.rows.sum.begin(), sums.rows.sum.end(), enough) &&
        std::all_of(sums.cols.sum.begin(), sums.cols.sum.end(), enough))
      return result(sums);
  }
  return result(sum_with_own_shifts(tiling));
}

std::tuple<Tensor, Tensor, Tensor> similarity_stats_fwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale,
    const std::optional<Tensor>& row_class, const std::optional<Tensor>& col_class,
    const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask, double margin,
    bool totals, int64_t kept_rows) {
  Tiling tiling(x, y, logit_scale, PairRules(row_class, col_class, row_mask, col_mask), margin);
  const Tensor kept = torch::stable::new_empty(tiling.x().tensor(), {kept_rows, tiling.cols()},
                                               torch::headeronly::ScalarType::Float);
  tiling.keep_in(kept);
  const auto [rows, cols] = statistics(tiling, totals);
  return {rows, cols, kept};
}

}  // namespace m3bind::cpu
