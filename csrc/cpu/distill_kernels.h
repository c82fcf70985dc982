// The passes of similarity_distill over two tiles of dot products, the student's S and the
// teacher's T: part of RowKernels.
#pragma once

#include <cstdint>

#include "factor.h"

namespace m3bind::cpu {

// One value of the student and one of the teacher for each row, or for each column.
template <class T>
struct Both {
  T* student;
  T* teacher;
};

// What a divergence is made of, of each row or column. With shifted logits s and t, in base 2:
template <class T>
struct DivergenceSums {
  T* student;  // sum of 2^s
  T* teacher;  // sum of 2^t
  T* change;   // sum of 2^s - 2^t, exact where the two are nearly equal
  T* cross;    // sum of 2^t * (t - s), or of 2^t * -s for the cross-entropy
};

// Upstream gradients with the shifts folded in: g * 2^(shift - LSE).
struct ShareWeights {
  const float* student;
  const float* teacher;
  const float* change;  // student's less teacher's, before they were rounded
};

// `rows` x `cols` dot products of both, contiguous; -inf in both where a pair is left out.
struct DualBlock {
  float* student;
  const float* teacher;
  int64_t rows, cols;
  Factor student_factor, teacher_factor;
};

struct DistillKernels {
  // With one shift for all logits, added to the sums of the rows and of the columns.
  void (*sum_shifted)(const DualBlock& block, bool kl, float shift,
                      const DivergenceSums<double>& rows, const DivergenceSums<float>& cols);
  // Each row and each column shifted by its own.
  void (*sum_own_shift)(const DualBlock& block, bool kl, const Both<const float>& row_shift,
                        const Both<const float>& col_shift, const DivergenceSums<double>& rows,
                        const DivergenceSums<float>& cols);
  // S = 2^s * (row's + column's weight of the student) - 2^t * (the teacher's), as one difference.
  // The sum of the new values times the old ones is added to by_dot[rows], pairs left out apart.
  void (*gradient_shifted)(const DualBlock& block, float shift, const ShareWeights& rows,
                           const ShareWeights& cols, double* by_dot);
  // The same with own shifts, the LSEs rounded; `gap` is the teacher's less the student's.
  void (*gradient_own_shift)(const DualBlock& block, const Both<const float>& row_shift,
                             const float* row_gap, const ShareWeights& rows,
                             const Both<const float>& col_shift, const float* col_gap,
                             const ShareWeights& cols, double* by_dot);
};

}  // namespace m3bind::cpu
