"""What the kernels of similarity_distill share: sums of one direction, and bringing them together.

Sums of a row's (or column's) pairs, each of student and teacher under an integer shift in base 2::

    student = sum of e_s = 2^(student's logit - shift), teacher = sum of e_t
    change = sum of e_s - e_t: tells the two apart when their sums, rounded, are equal; not finite
        where it would not be exact
    cross = sum of e_t * (shifted teacher - shifted student), or of e_t * -shifted student
"""

import triton
import triton.language as tl

from m3bind_kernels.tiles import finite_shift, numbers


@triton.jit
def pairs_left_out(row_mask, col_mask, rows, cols, num_rows, num_cols, HAS_MASKS: tl.constexpr):
    """Pairs beyond the matrix, and those of equal masks."""
    left_out = (rows >= num_rows)[:, None] | (cols >= num_cols)[None, :]
    if HAS_MASKS:
        row_number = numbers(row_mask, rows, num_rows, -1)[:, None]
        left_out = left_out | (row_number == numbers(col_mask, cols, num_cols, -2)[None, :])
    return left_out


@triton.jit
def difference(e_s, e_t, less):
    """e_s - e_t, which are 2^a and 2^(a - less), to the last bits where they are nearly equal."""
    p = less * 1.5252733804059841e-05 + 0.00015403530393381608
    p = p * less + 0.0013333558146428443
    p = p * less + 0.009618129107628477
    p = p * less + 0.05550410866482158
    p = p * less + 0.2402265069591007
    p = p * less + 0.6931471805599453
    return tl.where(tl.abs(less) < 0.5, e_t * (p * less), e_s - e_t)


@triton.jit
def shifts_above(student, teacher):
    """Integers above the highest logits: one for both where they are close, so that equal logits
    have equal powers; -inf where there is no logit."""
    close = tl.abs(student - teacher) <= 8.0
    both = tl.maximum(student, teacher)
    return tl.ceil(tl.where(close, both, student)), tl.ceil(tl.where(close, both, teacher))


@triton.jit
def terms(student, teacher, KL: tl.constexpr):
    """e_s, e_t, e_s - e_t and the cross term of shifted logits."""
    e_s, e_t, less = tl.exp2(student), tl.exp2(teacher), student - teacher
    cross = -e_t * less if KL else -e_t * student
    return e_s, e_t, difference(e_s, e_t, less), cross


@triton.jit
def moved(
    student_shift, teacher_shift, student, teacher, change, cross, student_to, teacher_to,
    KL: tl.constexpr,
):  # fmt: skip
    """The sums under shifts that are not smaller; a shift of -inf is that of an empty sum."""
    by_student = tl.where(student_shift == -float("inf"), 0.0, student_shift - student_to)
    by_teacher = tl.where(teacher_shift == -float("inf"), 0.0, teacher_shift - teacher_to)
    down_s, down_t = tl.exp2(by_student), tl.exp2(by_teacher)
    offset = by_teacher - by_student if KL else -by_student
    # Student and teacher that nearly agree have the same shifts, and move alike.
    change = tl.where(by_student == by_teacher, change * down_s, float("inf"))
    cross = (cross + teacher * offset) * down_t
    return student * down_s, teacher * down_t, change, cross


@triton.jit
def sums_by_own_shifts(student, teacher, left_out, AXIS: tl.constexpr, KL: tl.constexpr):
    """Every row or column under shifts of its own: (two shifts, four sums)."""
    student = tl.where(left_out, -float("inf"), student)
    teacher = tl.where(left_out, -float("inf"), teacher)
    shift_s, shift_t = shifts_above(tl.max(student, AXIS), tl.max(teacher, AXIS))
    student -= tl.expand_dims(finite_shift(shift_s), AXIS)
    teacher -= tl.expand_dims(finite_shift(shift_t), AXIS)
    e_s, e_t, change, cross = terms(student, teacher, KL)
    change = tl.sum(tl.where(left_out, 0.0, change), AXIS)
    cross = tl.sum(tl.where(left_out, 0.0, cross), AXIS)
    return shift_s, shift_t, tl.sum(e_s, AXIS), tl.sum(e_t, AXIS), change, cross


@triton.jit
def store_sums(
    at, plane, mask, shift_s, shift_t, student, teacher, change, cross
):  # fmt: skip
    tl.store(at, shift_s, mask=mask)
    tl.store(at + plane, shift_t, mask=mask)
    tl.store(at + 2 * plane, student, mask=mask)
    tl.store(at + 3 * plane, teacher, mask=mask)
    tl.store(at + 4 * plane, change, mask=mask)
    tl.store(at + 5 * plane, cross, mask=mask)


@triton.jit
def load_sums(at, plane, mask):
    """What `store_sums` stored, in float64; nothing where it is masked."""
    return (
        tl.load(at, mask=mask, other=-float("inf")).to(tl.float64),
        tl.load(at + plane, mask=mask, other=-float("inf")).to(tl.float64),
        tl.load(at + 2 * plane, mask=mask, other=0.0).to(tl.float64),
        tl.load(at + 3 * plane, mask=mask, other=0.0).to(tl.float64),
        tl.load(at + 4 * plane, mask=mask, other=0.0).to(tl.float64),
        tl.load(at + 5 * plane, mask=mask, other=0.0).to(tl.float64),
    )
