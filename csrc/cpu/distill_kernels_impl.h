// The source of DistillKernels, compiled once an instruction set: row_kernels_impl.h includes it
// within its namespace, after the vector functions that it uses.

// 2^-d - 1 for |d| <= kNear, to float32's last bit (the exponential series).
constexpr float kNear = 0.5f;
inline Vec exp2_less_one(Vec minus_d) {
  constexpr float kCoefficients[] = {1.5252733804e-5f, 1.5403530394e-4f, 1.3333558146e-3f,
                                     9.6181291076e-3f, 5.5504108665e-2f, 2.4022650696e-1f,
                                     6.9314718056e-1f};
  Vec p = splat(kCoefficients[0]);
  for (int k = 1; k < 7; ++k) p = multiply_add(p, minus_d, splat(kCoefficients[k]));
  return p * minus_d;
}

inline Vec select(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }

// Whether |d| is small: a difference of two exponentials would lose its digits.
inline IntVec near(Vec d) { return (d <= kNear) & (d >= -kNear); }

struct DualFactor {
  VecFactor student, teacher;
  explicit DualFactor(const DualBlock& p) : student(p.student_factor), teacher(p.teacher_factor) {}

  // The teacher's logit less the student's: one difference, so that logits of 100 that agree to
  // 1e-5 do not drown in their own rounding. NaN where a pair is left out.
  Vec difference(Vec s, Vec t) const {
    const Vec product = s * student.high;
    const Vec lost = fma(s, student.high, -product);
    // Both low parts less the same rounded one, so that equal logits differ by exactly 0.
    const Vec low = s * student.low;
    const Vec low_difference = fma(t, teacher.low, -low) - fma(s, student.low, -low);
    return (fma(t, teacher.high, -product) - lost) + low_difference;
  }
};

// What one vector of logits adds to the sums.
struct Added {
  Vec student, teacher, change, cross;
};

template <bool kKl, bool kOwnShift>
inline Added divergence(Vec s, Vec t, const DualFactor& factor, Vec difference, Vec student_shift,
                        Vec teacher_shift) {
  const Vec shifted = factor.student.minus(s, student_shift);
  const Vec aim = factor.teacher.minus(t, teacher_shift);
  // Logits that are far apart have a rounded difference: better that of the shifted ones.
  if (kOwnShift)
    difference =
        select(near(difference), difference - (teacher_shift - student_shift), aim - shifted);
  const Vec e_s = exp2(shifted), e_t = exp2(aim);
  const Vec change = select(near(difference), e_t * exp2_less_one(-difference), e_s - e_t);
  // A probability of 0 counts nothing, however far the student is.
  const Vec cross = select(aim < -126.0f, Vec{}, e_t * (kKl ? difference : -shifted));
  return {e_s, e_t, change, cross};
}

inline void add(Added& to, const Added& more) {
  to.student += more.student;
  to.teacher += more.teacher;
  to.change += more.change;
  to.cross += more.cross;
}

inline void add_part(float* to, Vec more, int64_t count) {
  if (count == kLanes) {
    store(to, load(to) + more);
  } else {
    store_part(to, load_part(to, count, 0) + more, count);
  }
}

inline Vec load_dots(const float* p, int64_t count) {
  return count == kLanes ? load(p) : load_part(p, count, -kInf);
}

struct OwnShifts {
  const float *row_student, *row_teacher, *col_student, *col_teacher;
};

template <int kRows, bool kKl, bool kOwnShift>
inline void sum_dual_rows(const float* s, const float* t, int64_t width, const DualFactor& factor,
                          Vec common, const OwnShifts& own, const DivergenceSums<double>& rows,
                          const DivergenceSums<float>& cols) {
  Added row_sums[kRows] = {};
  Vec row_student[kRows], row_teacher[kRows];
  for (int r = 0; r < kRows; ++r) {
    row_student[r] = kOwnShift ? splat(own.row_student[r]) : common;
    row_teacher[r] = kOwnShift ? splat(own.row_teacher[r]) : common;
  }
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t count = width - j < kLanes ? width - j : kLanes;
    const Vec col_student = kOwnShift ? load_up_to(own.col_student + j, count) : common;
    const Vec col_teacher = kOwnShift ? load_up_to(own.col_teacher + j, count) : common;
    Added col_sums = {};
    for (int r = 0; r < kRows; ++r) {
      const Vec dots = load_dots(s + r * width + j, count),
                aims = load_dots(t + r * width + j, count);
      const Vec d = factor.difference(dots, aims);
      const Added of_row =
          divergence<kKl, kOwnShift>(dots, aims, factor, d, row_student[r], row_teacher[r]);
      add(row_sums[r], of_row);
      if (kOwnShift)
        add(col_sums, divergence<kKl, true>(dots, aims, factor, d, col_student, col_teacher));
      else
        add(col_sums, of_row);
    }
    add_part(cols.student + j, col_sums.student, count);
    add_part(cols.teacher + j, col_sums.teacher, count);
    add_part(cols.change + j, col_sums.change, count);
    add_part(cols.cross + j, col_sums.cross, count);
  }
  for (int r = 0; r < kRows; ++r) {
    rows.student[r] += reduce_add(row_sums[r].student);
    rows.teacher[r] += reduce_add(row_sums[r].teacher);
    rows.change[r] += reduce_add(row_sums[r].change);
    rows.cross[r] += reduce_add(row_sums[r].cross);
  }
}

template <class T>
inline DivergenceSums<T> moved(const DivergenceSums<T>& sums, int64_t by) {
  return {sums.student + by, sums.teacher + by, sums.change + by, sums.cross + by};
}

template <bool kKl, bool kOwnShift>
inline void sum_dual_tile(const DualBlock& p, float shift, const Both<const float>& row_shift,
                          const Both<const float>& col_shift, const DivergenceSums<double>& rows,
                          const DivergenceSums<float>& cols) {
  constexpr int kRows = 2;
  const DualFactor factor(p);
  const Vec common = splat(shift);
  const auto run = [&]<int kCount>(int64_t i) {
    OwnShifts own = {};
    if (kOwnShift)
      own = {row_shift.student + i, row_shift.teacher + i, col_shift.student, col_shift.teacher};
    sum_dual_rows<kCount, kKl, kOwnShift>(p.student + i * p.cols, p.teacher + i * p.cols, p.cols,
                                          factor, common, own, moved(rows, i), cols);
  };
  int64_t i = 0;
  for (; i + kRows <= p.rows; i += kRows) run.template operator()<kRows>(i);
  for (; i < p.rows; ++i) run.template operator()<1>(i);
}

void sum_dual_shifted(const DualBlock& block, bool kl, float shift,
                      const DivergenceSums<double>& rows, const DivergenceSums<float>& cols) {
  if (kl)
    sum_dual_tile<true, false>(block, shift, {}, {}, rows, cols);
  else
    sum_dual_tile<false, false>(block, shift, {}, {}, rows, cols);
}

void sum_dual_own_shift(const DualBlock& block, bool kl, const Both<const float>& row_shift,
                        const Both<const float>& col_shift, const DivergenceSums<double>& rows,
                        const DivergenceSums<float>& cols) {
  if (kl)
    sum_dual_tile<true, true>(block, 0, row_shift, col_shift, rows, cols);
  else
    sum_dual_tile<false, true>(block, 0, row_shift, col_shift, rows, cols);
}

// Replaces a row of the student's dot products by derivatives(student's, teacher's, first column,
// columns); returns the sum of derivative * student's dot.
template <class F>
inline float derive_dual_row(float* s, const float* t, int64_t cols, const F& derivatives) {
  Vec sum = {};
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int64_t count = cols - j < kLanes ? cols - j : kLanes;
    const Vec dots = load_dots(s + j, count);
    const Vec grad = derivatives(dots, load_dots(t + j, count), j, count);
    sum = multiply_add(grad, select(dots == -kInf, Vec{}, dots), sum);
    if (count == kLanes)
      store(s + j, grad);
    else
      store_part(s + j, grad, count);
  }
  return reduce_add(sum);
}

void gradient_dual_shifted(const DualBlock& p, float shift, const ShareWeights& rows,
                           const ShareWeights& cols, double* by_dot) {
  const DualFactor factor(p);
  const Vec common = splat(shift);
  for (int64_t i = 0; i < p.rows; ++i) {
    const Vec row_student = splat(rows.student[i]), row_teacher = splat(rows.teacher[i]);
    const Vec row_change = splat(rows.change[i]);
    const auto share = [&](Vec s, Vec t, int64_t j, int64_t count) {
      const Vec e_s = exp2(factor.student.minus(s, common));
      const Vec e_t = exp2(factor.teacher.minus(t, common));
      const Vec d = factor.difference(s, t);
      const Vec student = row_student + load_up_to(cols.student + j, count);
      const Vec teacher = row_teacher + load_up_to(cols.teacher + j, count);
      const Vec change = row_change + load_up_to(cols.change + j, count);
      return select(near(d), e_t * multiply_add(exp2_less_one(-d), student, change),
                    e_s * student - e_t * teacher);
    };
    by_dot[i] += derive_dual_row(p.student + i * p.cols, p.teacher + i * p.cols, p.cols, share);
  }
}

// weight * (student's share - teacher's share) in one direction.
inline Vec own_share(Vec s, Vec t, const DualFactor& factor, Vec difference, Vec gap,
                     Vec student_shift, Vec teacher_shift, Vec student_weight, Vec teacher_weight) {
  const Vec e_s = exp2(factor.student.minus(s, student_shift)) * student_weight;
  const Vec e_t = exp2(factor.teacher.minus(t, teacher_shift)) * teacher_weight;
  const Vec d = difference - gap;
  // Where the logits themselves are far apart, their difference is rounded more than the shares.
  return select(near(d) & near(difference), e_t * exp2_less_one(-d), e_s - e_t);
}

void gradient_dual_own_shift(const DualBlock& p, const Both<const float>& row_shift,
                             const float* row_gap, const ShareWeights& rows,
                             const Both<const float>& col_shift, const float* col_gap,
                             const ShareWeights& cols, double* by_dot) {
  const DualFactor factor(p);
  for (int64_t i = 0; i < p.rows; ++i) {
    const auto share = [&](Vec s, Vec t, int64_t j, int64_t count) {
      const Vec d = factor.difference(s, t);
      const Vec by_row =
          own_share(s, t, factor, d, splat(row_gap[i]), splat(row_shift.student[i]),
                    splat(row_shift.teacher[i]), splat(rows.student[i]), splat(rows.teacher[i]));
      const Vec by_col = own_share(
          s, t, factor, d, load_up_to(col_gap + j, count), load_up_to(col_shift.student + j, count),
          load_up_to(col_shift.teacher + j, count), load_up_to(cols.student + j, count),
          load_up_to(cols.teacher + j, count));
      return by_row + by_col;
    };
    by_dot[i] += derive_dual_row(p.student + i * p.cols, p.teacher + i * p.cols, p.cols, share);
  }
}
