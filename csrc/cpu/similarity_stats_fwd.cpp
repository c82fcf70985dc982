#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "block_columns.h"
#include "panel.h"
#include "similarity_stats.h"

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
  Sums(const Panels& panels, float shift)
      : rows(panels.rows(), shift), cols(panels.cols(), shift) {}

  // Computes a panel, and gathers what its positives and masked pairs add.
  void compute(Panels& panels, int64_t first, int64_t count) {
    panels.compute(first, count, [&](int64_t i, int64_t j, float value) {
      const double logit = panels.logit(value);
      rows.surplus[i] += logit;
      cols.surplus[j] += logit;
    });
    for (const Positive& p : panels.positives()) {
      const double logit = panels.logit(p.dot);
      rows.positives[p.row] += logit;
      cols.positives[p.col] += logit;
      rows.surplus[p.row] += panels.scale() * panels.margin();
      cols.surplus[p.col] += panels.scale() * panels.margin();
      // It was left out of both sums, though only one of them must not hold it.
      if (p.bits == kOneRow) rows.late.emplace_back(p.row, logit * kLog2E);
      if (p.bits == kOneColumn) cols.late.emplace_back(p.col, logit * kLog2E);
    }
  }
};

// One exponential a logit, with one shift for all of them.
Sums sum_with_common_shift(Panels& panels, float shift) {
  Sums sums(panels, shift);
  BlockColumns columns(panels.step(), panels.cols());
  const int64_t cols = panels.cols();
  panels.for_each([&](int64_t first, int64_t count) {
    sums.compute(panels, first, count);
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      row_kernels().sum_shifted(panels.data() + begin * cols, cols, end - begin, cols,
                                panels.factor(), shift, sums.rows.sum.data() + first + begin,
                                columns.start(begin, 0));
    });
    columns.merge(count, [&](int64_t j, float sum) { sums.cols.sum[j] += sum; });
  });
  return sums;
}

// Two exponentials a logit, each row and column shifted by its own maximum: for logits so far apart
// that the common shift loses a whole row or column to underflow.
Sums sum_with_own_shifts(Panels& panels) {
  Sums sums(panels, kMinusInf);
  BlockColumns columns(panels.step(), panels.cols());
  const int64_t cols = panels.cols();
  const auto finite = [](float shift) { return shift == kMinusInf ? 0.0f : shift; };
  std::vector<float> row_max(panels.step()), col_max(cols), before(cols);
  panels.for_each([&](int64_t first, int64_t count) {
    sums.compute(panels, first, count);
    std::fill(row_max.begin(), row_max.end(), kMinusInf);
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      row_kernels().maxima(panels.data() + begin * cols, cols, end - begin, cols, panels.factor(),
                           row_max.data() + begin, columns.start(begin, kMinusInf));
    });
    before = sums.cols.shift;
    columns.merge(count, [&](int64_t j, float value) {
      sums.cols.shift[j] = std::max(sums.cols.shift[j], value);
    });
    for (int64_t j = 0; j < cols; ++j) {
      col_max[j] = finite(sums.cols.shift[j]);
      // Before the first finite logit the sum is 0, or NaN, and has no shift to change.
      if (before[j] != kMinusInf)
        sums.cols.sum[j] *= std::exp2(static_cast<double>(before[j]) - col_max[j]);
    }
    for (int64_t i = 0; i < count; ++i)
      sums.rows.shift[first + i] = row_max[i] = finite(row_max[i]);
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      row_kernels().sum_own_shift(panels.data() + begin * cols, cols, end - begin, cols,
                                  panels.factor(), row_max.data() + begin, col_max.data(),
                                  sums.rows.sum.data() + first + begin, columns.start(begin, 0));
    });
    columns.merge(count, [&](int64_t j, float sum) { sums.cols.sum[j] += sum; });
  });
  std::transform(sums.cols.shift.begin(), sums.cols.shift.end(), sums.cols.shift.begin(), finite);
  return sums;
}

// log2(2^a + 2^b)
double add_exponentials(double a, double b) {
  const double high = std::max(a, b), low = std::min(a, b);
  return low == -std::numeric_limits<double>::infinity()
             ? high
             : high + std::log2(1 + std::exp2(low - high));
}

Tensor statistics(const Panels& panels, const Side& side, const FloatRows& own,
                  const FloatRows& others, bool totals) {
  const int64_t count = static_cast<int64_t>(side.sum.size());
  Tensor out = torch::stable::new_zeros(panels.x().tensor(), {3, count},
                                        torch::headeronly::ScalarType::Double);
  double* lse = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) lse[i] = std::log2(side.sum[i]) + side.shift[i];
  for (const auto& [i, logit] : side.late) lse[i] = add_exponentials(lse[i], logit);
  for (int64_t i = 0; i < count; ++i) lse[i] /= kLog2E;
  std::copy(side.positives.begin(), side.positives.end(), lse + count);
  if (!totals) return out;
  const std::vector<double> dots = own.dots(others.sum());
  for (int64_t i = 0; i < count; ++i)
    lse[2 * count + i] = panels.scale() * dots[i] - side.surplus[i];
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> statistics(Panels& panels, bool totals) {
  const float shift = panels.common_shift();
  const auto result = [&](const Sums& sums) {
    return std::tuple(statistics(panels, sums.rows, panels.x(), panels.y(), totals),
                      statistics(panels, sums.cols, panels.y(), panels.x(), totals));
  };
  if (std::isfinite(shift)) {
    const Sums sums = sum_with_common_shift(panels, shift);
    const double smallest = std::exp2(panels.smallest_log2_sum());
    const auto enough = [&](double sum) { return sum >= smallest; };
    if (std::all_of(sums.rows.sum.begin(), sums.rows.sum.end(), enough) &&
        std::all_of(sums.cols.sum.begin(), sums.cols.sum.end(), enough))
      return result(sums);
  }
  return result(sum_with_own_shifts(panels));
}

std::tuple<Tensor, Tensor, Tensor> similarity_stats_fwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale,
    const std::optional<Tensor>& row_class, const std::optional<Tensor>& col_class,
    const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask, double margin,
    bool totals, int64_t kept_rows) {
  Panels panels(x, y, logit_scale, PairRules(row_class, col_class, row_mask, col_mask), margin);
  const Tensor kept = torch::stable::new_empty(panels.x().tensor(), {kept_rows, panels.cols()},
                                               torch::headeronly::ScalarType::Float);
  panels.keep_in(kept);
  const auto [rows, cols] = statistics(panels, totals);
  return {rows, cols, kept};
}

}  // namespace m3bind::cpu
