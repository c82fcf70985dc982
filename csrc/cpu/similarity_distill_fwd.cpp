#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "similarity_distill.h"

namespace m3bind::cpu {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int kNumSums = 4;

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

  DivergenceSums<double> sums(int64_t first = 0) {
    double* all = values.data() + first;
    return {all, all + count, all + 2 * count, all + 3 * count};
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

  // To shifts that are at least so large.
  void raise(int64_t i, float student, float teacher, bool kl) {
    move(i, std::max(student_shift[i], student), std::max(teacher_shift[i], teacher), kl);
  }

  void clear(int64_t i) {
    for (int64_t kind = 0; kind < kNumSums; ++kind) values[kind * count + i] = 0;
    student_shift[i] = teacher_shift[i] = kMinusInf;
  }

  // Adds the sums p of `part`.
  void merge(int64_t i, Side& part, int64_t p, bool kl) {
    raise(i, part.student_shift[p], part.teacher_shift[p], kl);
    part.move(p, student_shift[i], teacher_shift[i], kl);
    for (int64_t kind = 0; kind < kNumSums; ++kind)
      values[kind * count + i] += part.values[kind * part.count + p];
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
  Sums(const DualTiling& tiling, float shift)
      : rows(tiling.student.rows(), shift), cols(tiling.student.cols(), shift) {}
};

// f(a block of the tile, its first row, column sums) on blocks of its rows.
template <class F>
void sum_blocks(const DualTiling& tiling, const Tile& own, const Tile& teachers, Side& cols,
                const F& f) {
  sum_columns(
      own, cols.values.data() + own.col,
      [&](int64_t begin, int64_t count, float* sums) {
        f(tiling.block(own, teachers, begin, count), begin,
          DivergenceSums<float>{sums, sums + own.cols, sums + 2 * own.cols, sums + 3 * own.cols});
      },
      kNumSums, cols.count);
}

// One exponential a logit, with one shift for all of them.
Sums sum_with_common_shift(DualTiling& tiling, bool kl, float shift) {
  Sums sums(tiling, shift);
  RowTotals rows = tiling.student.row_totals(kNumSums);
  tiling.for_each([&](std::span<Tile> tiles, std::span<Tile> teachers) {
    tiling.share(tiles, [&](Tile& tile) {
      tiling.compute(tile, teachers[tile.slot]);
      sum_blocks(tiling, tile, teachers[tile.slot], sums.cols,
                 [&](const DualBlock& block, int64_t begin, const DivergenceSums<float>& cols) {
                   row_kernels().distill.sum_shifted(
                       block, kl, shift,
                       {rows.of(tile, 0) + begin, rows.of(tile, 1) + begin,
                        rows.of(tile, 2) + begin, rows.of(tile, 3) + begin},
                       cols);
                 });
    });
    rows.merge(tiles);
  });
  sums.rows.values = rows.totals();
  return sums;
}

std::vector<float> finite_part(const std::vector<float>& shifts, int64_t first, int64_t count) {
  std::vector<float> out(shifts.begin() + first, shifts.begin() + first + count);
  std::transform(out.begin(), out.end(), out.begin(), finite);
  return out;
}

// The sums of a tile, with own shifts: those of its columns are there already, those of its rows
// are in `parts`, from `first`.
void add_with_own_shifts(DualTiling& tiling, Tile& own, Tile& teachers, bool kl, Side& cols,
                         Side& parts, int64_t first) {
  tiling.compute(own, teachers);
  std::vector<float> student(own.cols, kMinusInf), teacher(own.cols, kMinusInf);
  for (int64_t i = first; i < first + own.rows; ++i) parts.clear(i);
  const auto maxima = [&](const Tiling& side, const Tile& tile, std::vector<float>& row_max,
                          std::vector<float>& col_max) {
    row_kernels().maxima(tile.data, tile.rows, tile.cols, side.factor(), row_max.data() + first,
                         col_max.data());
  };
  maxima(tiling.student, own, parts.student_shift, student);
  maxima(tiling.teacher, teachers, parts.teacher_shift, teacher);
  for (int64_t j = 0; j < own.cols; ++j) cols.raise(own.col + j, student[j], teacher[j], kl);
  const std::vector<float> row_student = finite_part(parts.student_shift, first, own.rows),
                           row_teacher = finite_part(parts.teacher_shift, first, own.rows),
                           col_student = finite_part(cols.student_shift, own.col, own.cols),
                           col_teacher = finite_part(cols.teacher_shift, own.col, own.cols);
  sum_blocks(tiling, own, teachers, cols,
             [&](const DualBlock& block, int64_t begin, const DivergenceSums<float>& col_sums) {
               row_kernels().distill.sum_own_shift(
                   block, kl, {row_student.data() + begin, row_teacher.data() + begin},
                   {col_student.data(), col_teacher.data()}, parts.sums(first + begin), col_sums);
             });
}

// Two exponentials a logit, each row and column shifted by its own maximum: for logits so far apart
// that the common shift loses a whole row or column to underflow.
Sums sum_with_own_shifts(DualTiling& tiling, bool kl) {
  Sums sums(tiling, kMinusInf);
  Side parts(tiling.student.slots() * kTileRows, kMinusInf);
  tiling.for_each([&](std::span<Tile> tiles, std::span<Tile> teachers) {
    tiling.share(tiles, [&](Tile& tile) {
      add_with_own_shifts(tiling, tile, teachers[tile.slot], kl, sums.cols, parts,
                          tile.slot * kTileRows);
    });
    for (const Tile& tile : tiles)
      for (int64_t i = 0; i < tile.rows; ++i)
        sums.rows.merge(tile.row + i, parts, tile.slot * kTileRows + i, kl);
  });
  return sums;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_distill_fwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& teacher_x,
    const Tensor& teacher_y, const Tensor& teacher_scale, const std::optional<Tensor>& row_mask,
    const std::optional<Tensor>& col_mask, bool kl, int64_t kept_rows) {
  DualTiling tiling(x, y, logit_scale, teacher_x, teacher_y, teacher_scale, row_mask, col_mask);
  const Tensor kept = torch::stable::new_empty(x, {2, kept_rows, tiling.student.cols()},
                                               torch::headeronly::ScalarType::Float);
  tiling.keep_in(kept);
  const float shift = tiling.common_shift();
  const auto result = [&](Sums& sums) {
    const auto [row_loss, row_lse] = sums.rows.finish(x, kl);
    const auto [col_loss, col_lse] = sums.cols.finish(x, kl);
    return std::tuple(row_loss, col_loss, row_lse, col_lse, kept);
  };
  if (std::isfinite(shift)) {
    Sums sums = sum_with_common_shift(tiling, kl, shift);
    const double smallest = std::exp2(tiling.student.smallest_log2_sum());
    if (sums.rows.exact(smallest) && sums.cols.exact(smallest)) return result(sums);
  }
  Sums sums = sum_with_own_shifts(tiling, kl);
  return result(sums);
}

}  // namespace m3bind::cpu
