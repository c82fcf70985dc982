#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "block_columns.h"
#include "similarity_distill.h"

namespace m3bind::cpu {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int kNumSums = 4;

// `count` values of each of the sums, one after the other.
template <class T>
DivergenceSums<T> sections(T* values, int64_t count) {
  return {values, values + count, values + 2 * count, values + 3 * count};
}

float finite(float shift) { return shift == kMinusInf ? 0.0f : shift; }

// What is gathered of the rows, or of the columns.
struct Side {
  int64_t count;
  std::vector<double> values;
  std::vector<float> student_shift, teacher_shift;  // of each, in base 2

  Side(int64_t count, float start)
      : count(count),
        values(kNumSums * count),
        student_shift(count, start),
        teacher_shift(count, start) {}

  DivergenceSums<double> sums() { return sections(values.data(), count); }
  DivergenceSums<double> sums_from(int64_t first) {
    const DivergenceSums<double> all = sums();
    return {all.student + first, all.teacher + first, all.change + first, all.cross + first};
  }

  // Changes the shifts of the sums that are there already.
  void move(int64_t i, float student_to, float teacher_to, bool kl) {
    // Before the first finite logit the sums are 0, or NaN, and have no shift to change.
    const auto by = [](float from, float to) {
      return from == kMinusInf ? 0.0 : static_cast<double>(from) - finite(to);
    };
    const double student_by = by(student_shift[i], student_to);
    const double teacher_by = by(teacher_shift[i], teacher_to);
    const double student_down = std::exp2(student_by), teacher_down = std::exp2(teacher_by);
    const DivergenceSums<double> all = sums();
    const double offset = kl ? teacher_by - student_by : -student_by;
    all.cross[i] = (all.cross[i] + all.teacher[i] * offset) * teacher_down;
    // Far apart, the two sums tell the difference as well, and without the rounding that it has
    // from a sum which has since become small.
    const bool near = std::abs(all.change[i]) < 0.5 * all.teacher[i];
    const double moved =
        all.change[i] * student_down + all.teacher[i] * (student_down - teacher_down);
    all.student[i] *= student_down;
    all.teacher[i] *= teacher_down;
    all.change[i] = near ? moved : all.student[i] - all.teacher[i];
    student_shift[i] = student_to;
    teacher_shift[i] = teacher_to;
  }

  // Whether the common shift lost nothing to underflow, and nothing overflowed.
  bool exact(double smallest) {
    const DivergenceSums<double> all = sums();
    for (int64_t i = 0; i < count; ++i)
      if (!(all.student[i] >= smallest && all.teacher[i] >= smallest &&
            std::isfinite(all.cross[i]) && std::isfinite(all.change[i])))
        return false;
    return true;
  }

  // The divergences [count] and the log-sum-exps [2, count], float64.
  std::tuple<Tensor, Tensor> finish(const Tensor& like, bool kl) {
    constexpr auto kDouble = torch::headeronly::ScalarType::Double;
    Tensor loss = torch::stable::new_empty(like, {count}, kDouble);
    Tensor lse = torch::stable::new_empty(like, {2, count}, kDouble);
    double* losses = static_cast<double*>(loss.mutable_data_ptr());
    double* students = static_cast<double*>(lse.mutable_data_ptr());
    double* teachers = students + count;
    const DivergenceSums<double> all = sums();
    for (int64_t i = 0; i < count; ++i) {
      const double student = all.student[i], teacher = all.teacher[i];
      const double change = all.change[i] / teacher;
      // log(student / teacher), to the last digit also where both are nearly equal.
      const double apart = change > -0.5 ? std::log1p(change) : std::log(student / teacher);
      losses[i] = all.cross[i] / teacher / kLog2E + (kl ? apart : std::log(student));
      teachers[i] = std::log(teacher) + finite(teacher_shift[i]) / kLog2E;
      // Where everything is masked, apart is 0 / 0.
      students[i] = (teacher > 0 ? std::log(teacher) + apart : std::log(student)) +
                    finite(student_shift[i]) / kLog2E;
    }
    return {loss, lse};
  }
};

struct Sums {
  Side rows, cols;
  Sums(const DualPanels& panels, float shift)
      : rows(panels.student.rows(), shift), cols(panels.student.cols(), shift) {}
};

// One exponential a logit, with one shift for all of them.
Sums sum_with_common_shift(DualPanels& panels, bool kl, float shift) {
  Sums sums(panels, shift);
  const int64_t rows = sums.rows.count, cols = sums.cols.count, step = panels.student.step();
  BlockColumns columns(step, kNumSums * cols);
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    panels.compute(first, count);
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      row_kernels().distill.sum_shifted(panels.block(begin, end), kl, shift,
                                        sums.rows.sums_from(first + begin),
                                        sections(columns.start(begin, 0), cols));
    });
    columns.merge(count, [&](int64_t at, float sum) { sums.cols.values[at] += sum; });
  }
  return sums;
}

// The largest logits of the panel at hand, into the shifts of its rows and the columns seen so far.
void raise_shifts(const DualPanels& panels, int64_t first, int64_t count, bool kl, Sums& sums,
                  BlockColumns& columns, std::vector<float>& raised) {
  const int64_t cols = sums.cols.count;
  for_row_blocks(count, [&](int64_t begin, int64_t end) {
    float* col_max = columns.start(begin, kMinusInf);
    const DualPanel block = panels.block(begin, end);
    row_kernels().maxima(block.student, cols, block.rows, cols, block.student_factor,
                         sums.rows.student_shift.data() + first + begin, col_max);
    row_kernels().maxima(block.teacher, cols, block.rows, cols, block.teacher_factor,
                         sums.rows.teacher_shift.data() + first + begin, col_max + cols);
  });
  std::copy(sums.cols.student_shift.begin(), sums.cols.student_shift.end(), raised.begin());
  std::copy(sums.cols.teacher_shift.begin(), sums.cols.teacher_shift.end(), raised.begin() + cols);
  columns.merge(count, [&](int64_t at, float value) { raised[at] = std::max(raised[at], value); });
  for (int64_t j = 0; j < cols; ++j) sums.cols.move(j, raised[j], raised[cols + j], kl);
}

// Two exponentials a logit, each row and column shifted by its own maximum: for logits so far apart
// that the common shift loses a whole row or column to underflow.
Sums sum_with_own_shifts(DualPanels& panels, bool kl) {
  Sums sums(panels, kMinusInf);
  const int64_t rows = sums.rows.count, cols = sums.cols.count, step = panels.student.step();
  BlockColumns columns(step, kNumSums * cols);
  std::vector<float> raised(kNumSums * cols);
  const auto make_finite = [](std::vector<float>& shifts, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) shifts[i] = finite(shifts[i]);
  };
  std::vector<float> col_student(cols), col_teacher(cols);
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    panels.compute(first, count);
    raise_shifts(panels, first, count, kl, sums, columns, raised);
    make_finite(sums.rows.student_shift, first, first + count);
    make_finite(sums.rows.teacher_shift, first, first + count);
    std::transform(raised.begin(), raised.begin() + cols, col_student.begin(), finite);
    std::transform(raised.begin() + cols, raised.begin() + 2 * cols, col_teacher.begin(), finite);
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      row_kernels().distill.sum_own_shift(panels.block(begin, end), kl,
                                          {sums.rows.student_shift.data() + first + begin,
                                           sums.rows.teacher_shift.data() + first + begin},
                                          {col_student.data(), col_teacher.data()},
                                          sums.rows.sums_from(first + begin),
                                          sections(columns.start(begin, 0), cols));
    });
    columns.merge(count, [&](int64_t at, float sum) { sums.cols.values[at] += sum; });
  }
  return sums;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_distill_fwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& teacher_x,
    const Tensor& teacher_y, const Tensor& teacher_scale, const std::optional<Tensor>& row_mask,
    const std::optional<Tensor>& col_mask, bool kl) {
  DualPanels panels(x, y, logit_scale, teacher_x, teacher_y, teacher_scale, row_mask, col_mask);
  const float shift = panels.common_shift();
  const auto result = [&](Sums& sums) {
    const auto [row_loss, row_lse] = sums.rows.finish(x, kl);
    const auto [col_loss, col_lse] = sums.cols.finish(x, kl);
    return std::tuple(row_loss, col_loss, row_lse, col_lse);
  };
  if (std::isfinite(shift)) {
    Sums sums = sum_with_common_shift(panels, kl, shift);
    const double smallest = std::exp2(panels.student.smallest_log2_sum());
    if (sums.rows.exact(smallest) && sums.cols.exact(smallest)) return result(sums);
  }
  Sums sums = sum_with_own_shifts(panels, kl);
  return result(sums);
}

}  // namespace m3bind::cpu
