"""Teacher against student similarity distributions, as they are defined."""

import torch
from torch import Tensor

from m3bind.reference.clip import Ids, reduce
from m3bind.reference.lse import logits_of


def similarity_distill(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    teacher_x: Tensor,  # [N, E]
    teacher_y: Tensor,  # [M, E]
    teacher_scale: Tensor,  # []
    *,
    kind: str = "kl",
    mask_ids: Ids | None = None,
    directions: str = "both",
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, teacher_x.dtype)
    student = logits_of(x.to(dtype), y.to(dtype), logit_scale)
    teacher = logits_of(teacher_x.to(dtype), teacher_y.to(dtype), teacher_scale).detach()
    kept = torch.ones_like(teacher, dtype=torch.bool)
    if mask_ids is not None:
        kept = mask_ids[0][:, None] != mask_ids[1][None, :]
    losses = []
    if directions != "columns":
        losses.append(_direction(student, teacher, kept, kind))
    if directions != "rows":
        losses.append(_direction(student.T, teacher.T, kept.T, kind))
    return reduce(losses, reduction)


def _direction(
    student: Tensor,  # [N, M]
    teacher: Tensor,  # [N, M]
    kept: Tensor,  # [N, M] bool
    kind: str,
) -> tuple[Tensor, Tensor]:  # [N], [N] bool
    """The divergence of every row, 0 where nothing is left of it, and which rows have one."""
    valid = kept.any(1)
    # A row with nothing left keeps its logits here, since its softmax would be 0 / 0.
    left_out = ~kept & valid[:, None]
    log_p, log_q = (
        logits.masked_fill(left_out, -torch.inf).log_softmax(1) for logits in (teacher, student)
    )
    wanted = log_p - log_q if kind == "kl" else -log_q
    return (log_p.exp() * wanted).masked_fill(~kept, 0).sum(1), valid
