"""similarity_distill: the student's similarity distributions beside the teacher's.

The operator below gives, for every row and every column, the divergence and the log-sum-exps of the
student's and of the teacher's logits, from which the backward pass forms both distributions again:
of dot products of the first `kept_rows` rows that stayed in memory, and of others that it computes.
Pairs with equal mask leave both; the divergence where nothing is left is not a number.
"""

from typing import Any

import torch
from torch import Tensor

from m3bind import backends, reference
from m3bind.dtypes import accumulation_dtype, statistics_dtype
from m3bind.ops import arguments
from m3bind.ops.contrastive import DIRECTIONS, REDUCTIONS, Ids
from m3bind.ops.define import define, differentiate
from m3bind.ops.pairs import Pairs
from m3bind.ops.ranks import ONE_RANK, Ranks
from m3bind.ops.stats import BLOCK, MEMORY_BUDGET, fitting_rows
from m3bind.ops.tangents import Moves, of_both, with_moves

KINDS = ("kl", "ce")


def similarity_distill(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor | float,  # [] or [1]
    teacher_x: Tensor,  # [N, E]
    teacher_y: Tensor,  # [M, E]
    teacher_scale: Tensor | float,  # [] or [1]
    *,
    kind: str = "kl",
    mask_ids: Ids | None = None,  # [N], [M] int64
    directions: str = "both",
    reduction: str = "mean",
    memory_budget: float | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divergence of the student's from the teacher's similarities: O(N + M) memory and a budget.

    Equivalent to::

        s = logit_scale * x @ y.T
        t = (teacher_scale * teacher_x @ teacher_y.T).detach()
        rows = F.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean")
        cols = F.kl_div(s.T.log_softmax(1), t.T.log_softmax(1), log_target=True, ...)
        return (rows + cols) / 2

    Args:
        x, y: the student's features; float32, bfloat16, float16 (logits are formed in float32) or
            float64. Under autocast they are cast, as the teacher's are; the scales are not.
        logit_scale: the factor itself, not its logarithm; its gradient is exact.
        teacher_x, teacher_y, teacher_scale: the teacher's, of any width and a dtype of their own.
            They are detached: no gradient flows to the teacher.
        kind: "kl": KL(teacher || student), 0 where they agree, exact to the last digits also where
            they nearly do; "ce": the cross-entropy, which is that plus the teacher's entropy: the
            same gradient, and what open_clip's DistillClipLoss computes.
        mask_ids: pairs with equal ids leave both distributions (one tensor, where the ids of rows
            and columns are the same): duplicates, a row against itself.
        directions: "both" (their mean), "rows" (distributions over the columns) or "columns".
        reduction: "mean" over the rows, and over the columns, that have a pair left; "sum";
            "none": (rows [N], columns [M]), or the one that `directions` names, 0 where no pair is
            left. Nothing to average has the mean NaN and the sum 0, as in torch.
        memory_budget: MiB in which the forward pass may leave dot products of student and teacher
            for the backward pass, which forms the others again; 2 * N * M * 4 bytes hold all of
            them (float64: 8), and save two of six matrix products. Default: 64, which holds those
            of batches up to 2896. Results differ by no more than the order of sums. Backends
            "triton" and "cuda" keep nothing.
        backend: a name from `m3bind.backends.BACKENDS`; default: see `m3bind.backends`.

    Returns:
        float32 (float64 where the student's or the teacher's features are). Second derivatives:
        backend="reference" only.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit, an unknown or unavailable
            backend.

    Source: Wu et al. 2023, TinyCLIP, arXiv:2309.12314; Yang et al. 2024, CLIP-KD,
    arXiv:2307.12732; `open_clip.loss.DistillClipLoss`.
    """
    op = "similarity_distill"
    x, y = arguments.features(op, x, y)
    teacher_x, teacher_y = arguments.features(
        op, teacher_x, teacher_y, names=("teacher_x", "teacher_y")
    )
    arguments.same_rows(op, "teacher_x", teacher_x, "x", x)
    arguments.same_rows(op, "teacher_y", teacher_y, "y", y)
    arguments.choice(op, "kind", kind, KINDS)
    arguments.choice(op, "directions", directions, DIRECTIONS)
    arguments.choice(op, "reduction", reduction, REDUCTIONS)
    teacher_x, teacher_y = teacher_x.detach(), teacher_y.detach()
    wide = teacher_x if teacher_x.dtype == torch.float64 else x
    scale = arguments.scalar(op, "logit_scale", logit_scale, wide)
    teacher_scale = arguments.scalar(op, "teacher_scale", teacher_scale, wide).detach()
    if mask_ids is not None:
        mask_ids = arguments.id_pair(op, "mask_ids", mask_ids, x, y)
    if memory_budget is not None:
        memory_budget = arguments.number(op, "memory_budget", memory_budget, 0.0)
    chosen = backends.resolve(op, x.device.type, wide.dtype, backend)
    with arguments.without_autocast(x):
        if chosen == "reference":
            return reference.similarity_distill(
                x, y, scale, teacher_x, teacher_y, teacher_scale, kind=kind, mask_ids=mask_ids,
                directions=directions, reduction=reduction,
            )  # fmt: skip
        which = Pairs() if mask_ids is None else Pairs().masked_by(*mask_ids)
        if not arguments.gradient_wanted(x, y, scale):
            memory_budget = 0.0
        kept_rows = rows_to_keep(x, y.shape[0], wide.dtype, memory_budget, chosen)
        row_loss, col_loss, *_ = torch.ops.m3bind.similarity_distill_fwd(
            x, y, scale, teacher_x, teacher_y, teacher_scale, which.row_mask, which.col_mask,
            kind == "kl", kept_rows, chosen,
        )  # fmt: skip
        acc = accumulation_dtype(wide.dtype)
        losses = {"rows": row_loss.to(acc), "columns": col_loss.to(acc)}
        wanted = tuple(losses) if directions == "both" else (directions,)
        if mask_ids is None and x.shape[0] > 0 and y.shape[0] > 0:
            return _reduce_all([losses[name] for name in wanted], reduction)
        return composed(losses, wanted, which, x, y, ONE_RANK, reduction)


def rows_to_keep(
    x: Tensor, num_cols: int, dtype: torch.dtype, memory_budget: float | None, backend: str
) -> int:
    """How many rows of both matrices `memory_budget` MiB hold."""
    if backends.keeps("similarity_distill", backend) is None:
        return 0
    block_bytes = 2 * BLOCK * num_cols * accumulation_dtype(dtype).itemsize
    budget = MEMORY_BUDGET if memory_budget is None else memory_budget
    return fitting_rows(budget, block_bytes, x.shape[0])


def composed(
    losses: dict[str, Tensor],  # rows: [N], columns: [M]
    wanted: tuple[str, ...],
    which: Pairs,
    x: Tensor,
    y: Tensor,
    ranks: Ranks,
    reduction: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss, where some rows or columns may have nothing left."""
    left_rows, left_cols = which.unmasked(*ranks.totals(x, y))
    left = {
        "rows": ranks.own_rows(left_rows) if isinstance(left_rows, Tensor) else left_rows,
        "columns": ranks.own_columns(left_cols) if isinstance(left_cols, Tensor) else left_cols,
    }
    parts = []
    for name in wanted:
        valid = torch.zeros_like(losses[name]) + left[name] > 0
        parts.append((losses[name].where(valid, 0), valid))
    return ranks.reduce(parts, reduction)


def _reduce_all(losses: list[Tensor], reduction: str) -> Tensor | tuple[Tensor, Tensor]:
    """What `reduce` gives where every row and column counts, in fewer operations."""
    if reduction == "none":
        return (losses[0], losses[1]) if len(losses) == 2 else losses[0]
    values = [loss.mean() if reduction == "mean" else loss.sum() for loss in losses]
    return (values[0] + values[1]) / 2 if len(values) == 2 else values[0]


def _fwd_fake(
    x: Tensor, y: Tensor, logit_scale: Tensor, teacher_x: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, kept_rows, backend = rest
    stats = statistics_dtype(x.device)
    row_loss, col_loss = (t.new_empty(t.shape[0], dtype=stats) for t in (x, y))
    kept = 0 if backends.keeps("similarity_distill", backend) is None else kept_rows
    acc = accumulation_dtype(torch.promote_types(x.dtype, teacher_x.dtype))
    return (
        row_loss,
        col_loss,
        row_loss.new_empty(2, x.shape[0]),
        col_loss.new_empty(2, y.shape[0]),
        x.new_empty(2, kept, y.shape[0], dtype=acc),
    )


def _bwd_fake(
    x: Tensor, y: Tensor, logit_scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_x, need_y, _ = rest
    return (
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1])),
        y.new_empty((y.shape[0] if need_y else 0, y.shape[1])),
        torch.empty_like(logit_scale),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, _, _, ctx.backend = inputs
    _, _, *held = output
    ctx.mark_non_differentiable(*held)
    ctx.save_for_backward(*tensors, *held)


def _backward(
    ctx: Any, grad_rows: Tensor, grad_cols: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    grad_x, grad_y, grad_scale = torch.ops.m3bind.similarity_distill_bwd(
        *ctx.saved_tensors, grad_rows, grad_cols, need_x, need_y, ctx.backend
    )
    return (
        grad_x if need_x else None,
        grad_y if need_y else None,
        grad_scale if need_scale else None,
        *(None,) * 8,
    )


def _tangents(inputs: tuple[Any, ...], moves: Moves, _: Any) -> tuple[Tensor, Tensor]:
    x, y, scale, *others, kl, _, backend = inputs
    dx, dy, dscale, *_ = moves
    x, dx, y, dy = with_moves((x, dx), (y, dy))

    def gradients(x: Tensor, y: Tensor, scale: Tensor, of_x: bool) -> Tensor:
        given = (x, y, scale, *others)
        row_loss, col_loss, *held = torch.ops.m3bind.similarity_distill_fwd(*given, kl, 0, backend)
        grads = [torch.full_like(row_loss, of_x), torch.full_like(col_loss, not of_x)]
        return torch.ops.m3bind.similarity_distill_bwd(
            *given, *held, *grads, of_x, not of_x, backend
        )[0 if of_x else 1]

    return of_both(x, dx, y, dy, scale, dscale, gradients)


_INPUTS = (
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor teacher_x, Tensor teacher_y,"
    " Tensor teacher_scale, Tensor? row_mask, Tensor? col_mask"
)
define(
    "similarity_distill",
    "similarity_distill_fwd",
    _INPUTS + ", bool kl, SymInt kept_rows) -> (Tensor row_loss, Tensor col_loss, Tensor row_lse,"
    " Tensor col_lse, Tensor kept)",
    _fwd_fake,
)
define(
    "similarity_distill",
    "similarity_distill_bwd",
    _INPUTS + ", Tensor row_lse, Tensor col_lse, Tensor kept, Tensor grad_rows, Tensor grad_cols,"
    " bool need_x, bool need_y) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    _bwd_fake,
)
differentiate("similarity_distill", _save, _backward, _tangents)
