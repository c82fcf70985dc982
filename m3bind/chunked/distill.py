"""similarity_distill: see `m3bind.ops.distill` for what the arguments mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3bind.chunked.panels import panels, part
from m3bind.dtypes import accumulation_dtype, statistics_dtype


@dataclass(kw_only=True, slots=True)
class _Sums:
    """What one direction's divergences are made of, each shifted by its largest logits [L]."""

    student_shift: Tensor  # -inf before there was a logit
    teacher_shift: Tensor
    student: Tensor  # sum of e_s = exp(student - shift)
    teacher: Tensor  # sum of e_t
    change: Tensor  # sum of e_s - e_t: tells the two apart when their sums, rounded, are equal
    cross: Tensor  # sum of e_t * (shifted teacher - shifted student), or of e_t * -shifted student

    @classmethod
    def of_nothing(cls, count: int, dtype: torch.dtype, device: torch.device) -> "_Sums":
        lowest = torch.full((count,), -torch.inf, dtype=dtype, device=device)
        zero = torch.zeros_like(lowest)
        return cls(
            student_shift=lowest, teacher_shift=lowest, student=zero, teacher=zero, change=zero,
            cross=zero,
        )  # fmt: skip

    def merged(self, other: "_Sums", kl: bool) -> "_Sums":
        """The sums over the logits of both, under the larger shifts."""
        student, teacher, change, cross = (
            mine + others
            for mine, others in zip(self._moved(other, kl), other._moved(self, kl), strict=True)
        )
        return _Sums(
            student_shift=torch.maximum(self.student_shift, other.student_shift),
            teacher_shift=torch.maximum(self.teacher_shift, other.teacher_shift),
            student=student, teacher=teacher, change=change, cross=cross,
        )  # fmt: skip

    def _moved(self, other: "_Sums", kl: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        by_student = _step(self.student_shift, other.student_shift)
        by_teacher = _step(self.teacher_shift, other.teacher_shift)
        down_student, down_teacher = by_student.exp(), by_teacher.exp()
        offset = by_teacher - by_student if kl else -by_student
        return (
            self.student * down_student,
            self.teacher * down_teacher,
            self.change * down_student + self.teacher * (down_student - down_teacher),
            (self.cross + self.teacher * offset) * down_teacher,
        )

    def finish(self, kl: bool) -> tuple[Tensor, Tensor]:  # [L], [2, L]
        """The divergences, and the log-sum-exps of student and teacher."""
        change = self.change / self.teacher
        # log(student / teacher), to the last digit also where both are nearly equal.
        apart = (self.student / self.teacher).log().where(change < -0.5, change.log1p())
        loss = self.cross / self.teacher + (apart if kl else self.student.log())
        teacher = self.teacher.log() + self.teacher_shift
        student = self.teacher.log() + apart + self.student_shift
        # Where everything is masked, apart is 0 / 0.
        student = student.where(self.teacher > 0, self.student.log() + self.student_shift)
        return loss, torch.stack([student, teacher])


def _step(old: Tensor, other: Tensor) -> Tensor:
    """By how much a shift falls when the other's is merged; 0 where there was none before."""
    return (old - torch.maximum(old, other)).where(old != -torch.inf, 0)


def _difference(e_s: Tensor, e_t: Tensor, student_less_teacher: Tensor) -> Tensor:
    """e_s - e_t, which are exponentials of those two, exact where they are nearly equal."""
    near = student_less_teacher.abs() < 1
    return (e_t * student_less_teacher.expm1()).where(near, e_s - e_t)


def _sums(student: Tensor, teacher: Tensor, kl: bool, dim: int, dtype: torch.dtype) -> _Sums:
    if student.shape[dim] == 0:
        return _Sums.of_nothing(student.shape[1 - dim], dtype, student.device)
    shifts = [logits.amax(dim, keepdim=True) for logits in (student, teacher)]
    student, teacher = (
        logits - shift.masked_fill(shift.abs() == torch.inf, 0.0)
        for logits, shift in zip((student, teacher), shifts, strict=True)
    )
    e_s, e_t, less = student.exp(), teacher.exp(), student - teacher
    cross = (e_t * (-less if kl else -student)).masked_fill(teacher == -torch.inf, 0)
    return _Sums(
        student_shift=shifts[0].squeeze(dim).to(dtype),
        teacher_shift=shifts[1].squeeze(dim).to(dtype),
        student=e_s.sum(dim, dtype=dtype),
        teacher=e_t.sum(dim, dtype=dtype),
        change=_difference(e_s, e_t, less).sum(dim, dtype=dtype),
        cross=cross.sum(dim, dtype=dtype),
    )


@dataclass(kw_only=True, slots=True)
class _Side:
    """Features and scale of the student, or of the teacher, in the accumulation dtype."""

    x: Tensor
    y: Tensor
    scale: Tensor

    def dots(self, rows: slice) -> Tensor:
        return self.x[rows].to(self.y.dtype) @ self.y.T


def _sides(
    x: Tensor, y: Tensor, scale: Tensor, teacher_x: Tensor, teacher_y: Tensor, teacher_scale: Tensor
) -> tuple[_Side, _Side]:
    acc = accumulation_dtype(torch.promote_types(x.dtype, teacher_x.dtype))
    return (
        _Side(x=x, y=y.to(acc), scale=scale.to(acc)),
        _Side(x=teacher_x, y=teacher_y.to(acc), scale=teacher_scale.to(acc)),
    )


def _masked(logits: Tensor, row_mask: Tensor | None, col_mask: Tensor | None) -> Tensor:
    if row_mask is None or col_mask is None:
        return logits
    return logits.masked_fill_(row_mask[:, None] == col_mask, -torch.inf)


def similarity_distill_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    teacher_x: Tensor,  # [N, E]
    teacher_y: Tensor,  # [M, E]
    teacher_scale: Tensor,  # []
    row_mask: Tensor | None,  # [N]
    col_mask: Tensor | None,  # [M]
    kl: bool,
    kept_rows: int,
) -> tuple[Tensor, ...]:  # [N], [M], [2, N], [2, M], [2, kept_rows, M]
    stats = statistics_dtype(x.device)
    student, teacher = _sides(x, y, logit_scale, teacher_x, teacher_y, teacher_scale)
    row_loss = x.new_empty(x.shape[0], dtype=stats)
    row_lse = x.new_empty(2, x.shape[0], dtype=stats)
    cols = _Sums.of_nothing(y.shape[0], stats, x.device)
    kept = x.new_empty(2, kept_rows, y.shape[0], dtype=student.y.dtype)
    for at in panels(x.shape[0], y.shape[0], kept_rows):
        masks = part(row_mask, at), col_mask
        dots = student.dots(at), teacher.dots(at)
        if at.stop <= kept_rows:
            kept[0, at], kept[1, at] = dots
        logits = _masked(dots[0].mul_(student.scale), *masks)
        aims = _masked(dots[1].mul_(teacher.scale), *masks)
        row_loss[at], row_lse[:, at] = _sums(logits, aims, kl, 1, stats).finish(kl)
        cols = cols.merged(_sums(logits, aims, kl, 0, stats), kl)
    col_loss, col_lse = cols.finish(kl)
    return row_loss, col_loss, row_lse, col_lse, kept


def _shares(
    student: Tensor,  # [R, M]
    teacher: Tensor,  # [R, M]
    lse: Tensor,  # [2, R, 1] or [2, 1, M]
    grad: Tensor,  # [R, 1] or [1, M]
) -> Tensor:
    """grad * (student's softmax - teacher's softmax)"""
    # A fully masked row has the LSE -inf and only logits of -inf: any finite shift gives zeros.
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    shift = lse.to(student.dtype)
    weight = (grad * (shift - lse).exp()).to(student.dtype)  # makes up for the rounding
    left = lse - shift
    student, teacher = student - shift[0], teacher - shift[1]
    less = student - teacher + (left[1] - left[0]).to(student.dtype)
    return _difference(student.exp_().mul_(weight[0]), teacher.exp_().mul_(weight[1]), less)


def similarity_distill_bwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    teacher_x: Tensor,  # [N, E]
    teacher_y: Tensor,  # [M, E]
    teacher_scale: Tensor,  # []
    row_mask: Tensor | None,  # [N]
    col_mask: Tensor | None,  # [M]
    row_lse: Tensor,  # [2, N]
    col_lse: Tensor,  # [2, M]
    kept: Tensor,  # [2, kept_rows, M]
    grad_rows: Tensor,  # [N]
    grad_cols: Tensor,  # [M]
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], [M, D], []
    """Gradients of x, y and the scale; one that is not needed comes back empty, [0, D]."""
    student, teacher = _sides(x, y, logit_scale, teacher_x, teacher_y, teacher_scale)
    acc = student.y.dtype
    grad_x = torch.zeros(x.shape if need_x else (0, x.shape[1]), dtype=acc, device=x.device)
    grad_y = torch.zeros(y.shape if need_y else (0, y.shape[1]), dtype=acc, device=y.device)
    grad_scale = torch.zeros((), dtype=acc, device=x.device)
    kept_rows = kept.shape[1]
    for at in panels(x.shape[0], y.shape[0], kept_rows):
        masks = part(row_mask, at), col_mask
        there = at.stop <= kept_rows
        dots, aims = kept[:, at] if there else (student.dots(at), teacher.dots(at))
        logits = _masked(dots * student.scale, *masks)
        aims = _masked(aims * teacher.scale if there else aims.mul_(teacher.scale), *masks)
        grad = _shares(logits, aims, row_lse[:, at, None], grad_rows[at, None])
        grad += _shares(logits, aims, col_lse[:, None], grad_cols[None])
        if need_x:
            torch.mm(grad, student.y, out=grad_x[at])
        if need_y:
            grad_y.addmm_(grad.T, x[at].to(acc))
        grad_scale += grad.mul_(dots).sum()
    return (
        grad_x.mul_(student.scale).to(x.dtype),
        grad_y.mul_(student.scale).to(y.dtype),
        grad_scale.to(logit_scale.dtype),
    )
