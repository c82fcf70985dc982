#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "panel.h"
#include "similarity_lse.h"

namespace m3bind::cpu {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// Sums of 2^(logit - shift) in base 2, with the shift of each row and column.
struct Sums {
  std::vector<double> row_sum, col_sum;
  std::vector<float> row_shift, col_shift;
  Sums(int64_t rows, int64_t cols, float shift)
      : row_sum(rows), col_sum(cols), row_shift(rows, shift), col_shift(cols, shift) {}
};

// Column sums of the blocks of one panel, each written by one thread.
class BlockColumns {
 public:
  BlockColumns(int64_t panel_rows, int64_t cols)
      : cols_(cols), values_(((panel_rows + kBlockRows - 1) / kBlockRows) * cols) {}
  float* start(int64_t first_row, float value) {
    float* mine = values_.data() + (first_row / kBlockRows) * cols_;
    std::fill(mine, mine + cols_, value);
    return mine;
  }
  // Calls f(column, values of this column in the order of the blocks, blocks) on every column.
  template <class F>
  void merge(int64_t panel_rows, const F& f) const {
    const int64_t blocks = (panel_rows + kBlockRows - 1) / kBlockRows;
    torch::stable::parallel_for(0, cols_, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t j = begin; j < end; ++j) f(j, values_[b * cols_ + j]);
    });
  }

 private:
  int64_t cols_;
  std::vector<float> values_;
};

// One exponential a logit, with one shift for all of them.
Sums sum_with_common_shift(Panels& panels, float shift) {
  Sums sums(panels.rows(), panels.cols(), shift);
  BlockColumns columns(panels.step(), panels.cols());
  const int64_t cols = panels.cols();
  for (int64_t first = 0; first < panels.rows(); first += panels.step()) {
    const int64_t count = std::min(panels.step(), panels.rows() - first);
    panels.compute(first, count);
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      row_kernels().sum_shifted(panels.data() + begin * cols, cols, end - begin, cols,
                                panels.factor(), shift, sums.row_sum.data() + first + begin,
                                columns.start(begin, 0));
    });
    columns.merge(count, [&](int64_t j, float sum) { sums.col_sum[j] += sum; });
  }
  return sums;
}

// Two exponentials a logit, each row and column shifted by its own maximum: for logits so far apart
// that the common shift loses a whole row or column to underflow.
Sums sum_with_own_shifts(Panels& panels) {
  Sums sums(panels.rows(), panels.cols(), kMinusInf);
  BlockColumns columns(panels.step(), panels.cols());
  const int64_t cols = panels.cols();
  const auto finite = [](float shift) { return shift == kMinusInf ? 0.0f : shift; };
  std::vector<float> row_max(panels.step()), col_max(cols), before(cols);
  for (int64_t first = 0; first < panels.rows(); first += panels.step()) {
    const int64_t count = std::min(panels.step(), panels.rows() - first);
    panels.compute(first, count);
    std::fill(row_max.begin(), row_max.end(), kMinusInf);
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      row_kernels().maxima(panels.data() + begin * cols, cols, end - begin, cols, panels.factor(),
                           row_max.data() + begin, columns.start(begin, kMinusInf));
    });
    before = sums.col_shift;
    columns.merge(count, [&](int64_t j, float value) {
      sums.col_shift[j] = std::max(sums.col_shift[j], value);
    });
    for (int64_t j = 0; j < cols; ++j) {
      col_max[j] = finite(sums.col_shift[j]);
      // Before the first finite logit the sum is 0, or NaN, and has no shift to change.
      if (before[j] != kMinusInf)
        sums.col_sum[j] *= std::exp2(static_cast<double>(before[j]) - col_max[j]);
    }
    for (int64_t i = 0; i < count; ++i) sums.row_shift[first + i] = row_max[i] = finite(row_max[i]);
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      row_kernels().sum_own_shift(panels.data() + begin * cols, cols, end - begin, cols,
                                  panels.factor(), row_max.data() + begin, col_max.data(),
                                  sums.row_sum.data() + first + begin, columns.start(begin, 0));
    });
    columns.merge(count, [&](int64_t j, float sum) { sums.col_sum[j] += sum; });
  }
  std::transform(sums.col_shift.begin(), sums.col_shift.end(), sums.col_shift.begin(), finite);
  return sums;
}

Tensor lse(const Tensor& like, const std::vector<double>& sum, const std::vector<float>& shift) {
  const int64_t count = static_cast<int64_t>(sum.size());
  Tensor out = torch::stable::new_empty(like, {count}, torch::headeronly::ScalarType::Double);
  double* data = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) data[i] = (std::log2(sum[i]) + shift[i]) / kLog2E;
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> similarity_lse_fwd(const Tensor& x, const Tensor& y,
                                              const Tensor& logit_scale,
                                              const std::optional<Tensor>& row_ids,
                                              const std::optional<Tensor>& col_ids) {
  Panels panels(x, y, logit_scale, row_ids, col_ids);
  const float shift = panels.common_shift();
  if (std::isfinite(shift)) {
    const Sums sums = sum_with_common_shift(panels, shift);
    const double smallest = std::exp2(panels.smallest_log2_sum());
    const auto enough = [&](double sum) { return sum >= smallest; };
    if (std::all_of(sums.row_sum.begin(), sums.row_sum.end(), enough) &&
        std::all_of(sums.col_sum.begin(), sums.col_sum.end(), enough))
      return {lse(panels.x(), sums.row_sum, sums.row_shift),
              lse(panels.x(), sums.col_sum, sums.col_shift)};
  }
  const Sums sums = sum_with_own_shifts(panels);
  return {lse(panels.x(), sums.row_sum, sums.row_shift),
          lse(panels.x(), sums.col_sum, sums.col_shift)};
}

}  // namespace m3bind::cpu
