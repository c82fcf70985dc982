#include <algorithm>
#include <cmath>
#include <optional>
#include <span>
#include <vector>

#include "base2.h"
#include "rounding_loss.h"
#include "similarity_distill.h"
#include "whole_tensors.h"

namespace m3bind::cpu {
namespace {

// The upstream gradients of one direction, with the shifts of the exponentials folded in.
struct Weights {
  std::vector<float> student, teacher, change;

  ShareWeights from(int64_t first) const {
    return {student.data() + first, teacher.data() + first, change.data() + first};
  }
};

// One direction's LSEs (base 2) and upstream gradients.
struct Direction {
  std::vector<double> student_lse, teacher_lse, grad;

  Direction(const Tensor& lse, const Tensor& grads) : grad(read(grads)) {
    const std::vector<double> both = read(lse);
    STD_TORCH_CHECK(both.size() == 2 * grad.size(), "two LSEs for each upstream gradient");
    const auto middle = both.begin() + static_cast<std::ptrdiff_t>(grad.size());
    student_lse.resize(grad.size());
    teacher_lse.resize(grad.size());
    std::transform(both.begin(), middle, student_lse.begin(), in_base2);
    std::transform(middle, both.end(), teacher_lse.begin(), in_base2);
  }

  int64_t count() const { return static_cast<int64_t>(grad.size()); }

  // g * 2^(shift - LSE), so that times 2^(logit - shift) it is g * softmax. Empty where an LSE is
  // below `smallest`, or a weight is too large or not a number.
  Weights weights(double shift, double smallest) const {
    Weights out;
    for (int64_t i = 0; i < count(); ++i) {
      const double student = grad[i] * std::exp2(shift - student_lse[i]);
      const double teacher = grad[i] * std::exp2(shift - teacher_lse[i]);
      if (!(student_lse[i] >= smallest && teacher_lse[i] >= smallest &&
            std::abs(student) <= kLargestWeight && std::abs(teacher) <= kLargestWeight))
        return {};
      out.student.push_back(static_cast<float>(student));
      out.teacher.push_back(static_cast<float>(teacher));
      out.change.push_back(static_cast<float>(student - teacher));
    }
    return out;
  }

  // g * 2^(own shift - LSE): makes up for the rounding of the LSEs to their own shifts.
  Weights own_weights() const {
    Weights out;
    const auto rounding = [](double lse) { return softmax_base2(static_cast<float>(lse), lse); };
    for (int64_t i = 0; i < count(); ++i) {
      out.student.push_back(static_cast<float>(grad[i] * rounding(student_lse[i])));
      out.teacher.push_back(static_cast<float>(grad[i] * rounding(teacher_lse[i])));
      out.change.push_back(0);  // each direction forms its own difference
    }
    return out;
  }

  std::vector<float> gaps() const {
    std::vector<float> out(grad.size());
    for (size_t i = 0; i < grad.size(); ++i)
      out[i] = static_cast<float>(teacher_lse[i] - student_lse[i]);
    return out;
  }
};

struct OwnShifts {
  std::vector<float> student, teacher, gap;

  OwnShifts() = default;
  explicit OwnShifts(const Direction& direction)
      : student(direction.student_lse.begin(), direction.student_lse.end()),
        teacher(direction.teacher_lse.begin(), direction.teacher_lse.end()),
        gap(direction.gaps()) {}

  Both<const float> from(int64_t first) const {
    return {student.data() + first, teacher.data() + first};
  }
};

// The derivative by every logit of a tile, in place of the student's dot products.
class Gradient {
 public:
  Gradient(const DualTiling& tiling, const Direction& rows, const Direction& cols)
      : shift_(tiling.common_shift()), by_dot_(tiling.student.row_totals()) {
    if (std::isfinite(shift_)) {
      const double smallest = shift_ + tiling.student.smallest_log2_sum();
      rows_ = rows.weights(shift_, smallest);
      cols_ = cols.weights(shift_, smallest);
      one_exponential_ =
          rows_.student.size() == rows.grad.size() && cols_.student.size() == cols.grad.size();
    }
    if (one_exponential_) return;
    rows_ = rows.own_weights();
    cols_ = cols.own_weights();
    row_shifts_ = OwnShifts(rows);
    col_shifts_ = OwnShifts(cols);
  }

  // By any thread.
  void apply(const DualTiling& tiling, const Tile& own, const Tile& teachers) {
    const DistillKernels& kernels = row_kernels().distill;
    const DualBlock block = tiling.block(own, teachers, 0, own.rows);
    if (one_exponential_)
      kernels.gradient_shifted(block, shift_, rows_.from(own.row), cols_.from(own.col),
                               by_dot_.of(own));
    else
      kernels.gradient_own_shift(block, row_shifts_.from(own.row), row_shifts_.gap.data() + own.row,
                                 rows_.from(own.row), col_shifts_.from(own.col),
                                 col_shifts_.gap.data() + own.col, cols_.from(own.col),
                                 by_dot_.of(own));
  }
  // After all tiles that are in memory.
  void merge(std::span<const Tile> tiles) { by_dot_.merge(tiles); }

  // The sum of all derivatives times what the tiles held.
  double by_dot() const { return by_dot_.sum(); }

 private:
  float shift_;
  RowTotals by_dot_;
  bool one_exponential_ = false;
  Weights rows_, cols_;
  OwnShifts row_shifts_, col_shifts_;  // only where each has its own
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> similarity_distill_bwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& teacher_x,
    const Tensor& teacher_y, const Tensor& teacher_scale, const std::optional<Tensor>& row_mask,
    const std::optional<Tensor>& col_mask, const Tensor& row_lse, const Tensor& col_lse,
    const Tensor& kept, const Tensor& grad_rows, const Tensor& grad_cols, bool need_x,
    bool need_y) {
  DualTiling tiling(x, y, logit_scale, teacher_x, teacher_y, teacher_scale, row_mask, col_mask);
  tiling.take_from(kept);
  Tiling& student = tiling.student;
  const Direction rows(row_lse, grad_rows), cols(col_lse, grad_cols);
  STD_TORCH_CHECK(rows.count() == student.rows() && cols.count() == student.cols(),
                  "one gradient for each row and each column");
  Gradient gradient(tiling, rows, cols);
  FeatureGradients grads(student, need_x, need_y);
  std::optional<RoundingLoss> loss;
  if (!student.products().exact()) loss.emplace(student, rows.grad, cols.grad);
  tiling.for_each([&](std::span<Tile> tiles, std::span<Tile> teachers) {
    tiling.share(tiles, [&](Tile& tile) {
      tiling.compute(tile, teachers[tile.slot]);
      gradient.apply(tiling, tile, teachers[tile.slot]);
      if (loss) loss->take(tile);
      grads.take(tile);
    });
    gradient.merge(tiles);
    if (loss) loss->merge(tiles);
    grads.merge(tiles);
  });
  tiling.teacher.give_back();
  grads.finish();
  if (loss) loss->give_back(student, grads);
  grads.multiply(student.scale());
  return {
      torch::stable::to(grads.x(), x.scalar_type()), torch::stable::to(grads.y(), y.scalar_type()),
      torch::stable::to(number(x, gradient.by_dot() / student.unit()), logit_scale.scalar_type())};
}

}  // namespace m3bind::cpu
