#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <span>
#include <tuple>

#include "tiling.h"

namespace m3bind::cpu {

// The student's and the teacher's tiles, with the same pairs left out.
class DualTiling {
 public:
  DualTiling(const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& teacher_x,
             const Tensor& teacher_y, const Tensor& teacher_scale,
             const std::optional<Tensor>& row_mask, const std::optional<Tensor>& col_mask)
      : student(x, y, logit_scale, PairRules({}, {}, row_mask, col_mask), 0),
        teacher(teacher_x, teacher_y, teacher_scale, PairRules({}, {}, row_mask, col_mask), 0) {
    STD_TORCH_CHECK(student.rows() == teacher.rows() && student.cols() == teacher.cols(),
                    "student and teacher must have the same rows and the same columns");
  }

  // `kept` [2, R, M]: the student's and the teacher's dot products of the first R rows, see Tiling.
  void keep_in(const Tensor& kept) {
    student.keep_in(torch::stable::select(kept, 0, 0));
    teacher.keep_in(torch::stable::select(kept, 0, 1));
  }
  void take_from(const Tensor& kept) {
    student.take_from(torch::stable::select(kept, 0, 0));
    teacher.take_from(torch::stable::select(kept, 0, 1));
  }

  // f(student's tiles, teacher's tiles) on all tiles, those that are in memory at a time: see
  // Tiling.
  template <class F>
  void for_each(const F& f) {
    student.for_each([&](std::span<Tile> tiles) {
      const Range& first = tiles.front();
      const Range& last = tiles.back();
      f(tiles,
        teacher.lay_out({first.row, first.rows, first.col, last.col + last.cols - first.col}));
      teacher.put_back();
    });
  }

  // f(student's tile) on each, by torch's threads.
  template <class F>
  void share(std::span<Tile> tiles, const F& f) {
    student.share(tiles, [&](Tile& tile) {
      f(tile);
      teacher.products().end_of_thread();
    });
  }
  // By any thread.
  void compute(Tile& own, Tile& teachers) {
    student.compute(own);
    teacher.compute(teachers);
  }

  // Rows [begin, begin + count) of a tile.
  DualBlock block(const Tile& own, const Tile& teachers, int64_t begin, int64_t count) const {
    const int64_t at = begin * own.cols;
    return {own.data + at, teachers.data + at, count, own.cols, student.factor(), teacher.factor()};
  }

  // One shift for both, so that logits which agree are shifted to the same values.
  float common_shift() const {
    const float own = student.common_shift(), teachers = teacher.common_shift();
    return own >= teachers || own != own ? own : teachers;  // NaN stays
  }

  Tiling student, teacher;
};

// Divergences [N], [M] and log-sum-exps [2, N], [2, M] (student's, teacher's) of both
// distributions: see m3bind/ops/distill.py. The logits exist a few tiles at a time; both dot
// products of the first `kept_rows` rows, tile after tile, are the last result, [2, kept_rows, M].
// Results are the same bit for bit from call to call.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_distill_fwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& teacher_x,
    const Tensor& teacher_y, const Tensor& teacher_scale, const std::optional<Tensor>& row_mask,
    const std::optional<Tensor>& col_mask, bool kl, int64_t kept_rows);

// Gradients of x, y (each [0, D] where it is not needed) and the scale.
std::tuple<Tensor, Tensor, Tensor> similarity_distill_bwd(
    const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& teacher_x,
    const Tensor& teacher_y, const Tensor& teacher_scale, const std::optional<Tensor>& row_mask,
    const std::optional<Tensor>& col_mask, const Tensor& row_lse, const Tensor& col_lse,
    const Tensor& kept, const Tensor& grad_rows, const Tensor& grad_cols, bool need_x, bool need_y);

}  // namespace m3bind::cpu
