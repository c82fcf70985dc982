"""similarity_stats: all that a contrastive loss needs of the similarity matrix, in one pass.

With `s = logit_scale * (x @ y.T - margin * positive)`, for every row (and every column alike)::

    0: log-sum-exp of the logits that enter it
    1: sum of the logits of the positives
    2: sum of all logits that are not masked (0 unless `totals`)

`positive` are the pairs of equal class. A class is `4 * number + 2 * one_row + one_column`: the
only positive of a row stays out of its log-sum-exp, since `softplus(lse_of_negatives - positive)`
is exact where `lse_of_all - positive` cancels. Pairs with equal mask that are not positive are
masked: they enter nothing. `Pairs` makes the classes and masks out of what users pass.

What the backward pass needs of the first `kept_rows` rows stays in memory, and it forms the others
again: dot products, so that both passes see the same bits; or, in backends for GPUs, where memory
is slow beside products, powers of 2 as wide as the features.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind import backends
from m3bind.dtypes import accumulation_dtype, statistics_dtype
from m3bind.ops.define import define, differentiate
from m3bind.ops.pairs import Pairs
from m3bind.ops.tangents import Moves, of_both, with_moves

MEMORY_BUDGET = 64.0  # MiB, of dot products
BLOCK = 64  # rows and columns of what is kept
# Up to so many the kernels for GPUs do without, see Kept.of in m3bind_kernels.
FEW_FEATURES, FEW_PAIRS = 256, 1 << 20
_INPUTS = (
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor? row_class, Tensor? col_class,"
    " Tensor? row_mask, Tensor? col_mask, float margin, bool totals"
)


def similarity_stats(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    pairs: Pairs,
    *,
    margin: float = 0.0,
    totals: bool = False,
    kept_rows: int = 0,
    backend: str,
) -> tuple[Tensor, Tensor]:  # [3, N], [3, M]
    rows, cols, _ = torch.ops.m3bind.similarity_stats_fwd(
        x, y, logit_scale, pairs.row_class, pairs.col_class, pairs.row_mask, pairs.col_mask,
        margin, totals, kept_rows, backend,
    )  # fmt: skip
    return rows, cols


def rows_to_keep(
    x: Tensor, num_cols: int, memory_budget: float | None, totals: bool, backend: str
) -> int:
    """How many rows `memory_budget` MiB hold."""
    powers, num_rows = backends.keeps("similarity_stats", backend) == "powers", x.shape[0]
    if memory_budget is None:
        memory_budget = 0.0 if powers else MEMORY_BUDGET
    few = x.shape[1] <= FEW_FEATURES or (x.itemsize == 2 and num_rows * num_cols <= FEW_PAIRS)
    if powers and (totals or few):
        return 0
    words = math.prod(kept_shape(x, BLOCK, num_cols, backend))  # of a block of rows
    return fitting_rows(memory_budget, words * accumulation_dtype(x.dtype).itemsize, num_rows)


def fitting_rows(memory_budget: float, block_bytes: int, num_rows: int) -> int:
    """How many rows `memory_budget` MiB hold: all, or whole blocks of 64."""
    fitting = memory_budget * 2**20 / max(1, block_bytes) * BLOCK
    return num_rows if fitting >= num_rows else int(fitting) // BLOCK * BLOCK


def kept_shape(x: Tensor, kept_rows: int, num_cols: int, backend: str) -> tuple[int, ...]:
    """Of the tensor that keeps them, in the dtype of sums. For powers it is memory that
    m3bind_kernels.kept divides: powers, two sums a row and column of each tile, shifts."""
    if backends.keeps("similarity_stats", backend) != "powers":
        return kept_rows, num_cols
    down, across = ((size + BLOCK - 1) // BLOCK for size in (kept_rows, num_cols))
    row_words = BLOCK * x.itemsize // 4 + 2
    return (across * (kept_rows * row_words + down * (2 * BLOCK + 1)),)


def fwd_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    stats, acc = statistics_dtype(x.device), accumulation_dtype(x.dtype)
    *_, kept_rows, backend = rest
    return (
        x.new_empty(3, x.shape[0], dtype=stats),
        y.new_empty(3, y.shape[0], dtype=stats),
        x.new_empty(kept_shape(x, kept_rows, y.shape[0], backend), dtype=acc),
    )


def bwd_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_x, need_y, _ = rest
    return (
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1])),
        y.new_empty((y.shape[0] if need_y else 0, y.shape[1])),
        x.new_empty((), dtype=accumulation_dtype(x.dtype)),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.margin, ctx.totals, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[2])


def _backward(
    ctx: Any, grad_rows: Tensor, grad_cols: Tensor, unused: Tensor
) -> tuple[Tensor | None, ...]:
    *tensors, rows, cols, kept = ctx.saved_tensors
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    grad_x, grad_y, grad_scale = torch.ops.m3bind.similarity_stats_bwd(
        *tensors, ctx.margin, ctx.totals, rows[0], cols[0], kept, grad_rows, grad_cols,
        need_x, need_y, ctx.backend,
    )  # fmt: skip
    return (
        grad_x if need_x else None,
        grad_y if need_y else None,
        grad_scale if need_scale else None,
        *(None,) * 8,
    )


def _tangents(inputs: tuple[Any, ...], moves: Moves, _: Any) -> tuple[Tensor, Tensor]:
    x, y, scale, *held, margin, totals, _, backend = inputs
    dx, dy, dscale, *_ = moves
    x, dx, y, dy = with_moves((x, dx), (y, dy))
    wanted = range(3 if totals else 2)

    def gradients(x: Tensor, y: Tensor, scale: Tensor, of_x: bool) -> Tensor:
        given = (x, y, scale, *held, margin, totals)
        rows, cols, kept = torch.ops.m3bind.similarity_stats_fwd(*given, 0, backend)
        found = []
        for i in wanted:
            one = (torch.arange(3, device=rows.device) == i).to(rows.dtype)[:, None]
            grads = one * torch.full_like(rows, of_x), one * torch.full_like(cols, not of_x)
            grads = torch.ops.m3bind.similarity_stats_bwd(
                *given, rows[0], cols[0], kept, *grads, of_x, not of_x, backend
            )
            found.append(grads[0 if of_x else 1])
        return torch.stack(found)

    both = of_both(x, dx, y, dy, scale, dscale, gradients)
    if margin and dscale is not None and held[0] is not None:
        shares = _positive_shares(x, y, scale, held, margin, backend)
        both = tuple(
            own - dscale * margin * share[: len(own)]
            for own, share in zip(both, shares, strict=True)
        )
    rows, cols = (F.pad(own, (0, 0, 0, 3 - len(own))) for own in both)
    return rows, cols


def _positive_shares(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    held: list[Tensor | None],
    margin: float,
    backend: str,
) -> list[Tensor]:  # [3, N], [3, M]
    """How much of each statistic moves when the logits of all positives do."""
    row_class, col_class, *_ = held
    assert row_class is not None and col_class is not None
    forward = torch.ops.m3bind.similarity_stats_fwd
    # One mask for all: positives alone stay.
    masks = [torch.zeros_like(t, dtype=torch.int32) for t in (row_class, col_class)]
    positives = forward(x, y, scale, row_class, col_class, *masks, margin, False, 0, backend)
    every = forward(x, y, scale, *held, margin, False, 0, backend)
    # Logits of 0, less a margin of -1 at each positive.
    zeros = [torch.zeros_like(t[:, :1]) for t in (x, y)]
    counts = forward(
        *zeros, torch.ones_like(scale), row_class, col_class, None, None, -1.0, False, 0, backend
    )
    shares = []
    for some, all_, count in zip(positives[:2], every[:2], counts[:2], strict=True):
        part = (some[0] - all_[0]).exp().where(some[0] > -torch.inf, 0)
        shares.append(torch.stack([part, count[1], count[1]]))
    return shares


define(
    "similarity_stats",
    "similarity_stats_fwd",
    _INPUTS + ", SymInt kept_rows) -> (Tensor rows, Tensor cols, Tensor kept)",
    fwd_fake,
)
define(
    "similarity_stats",
    "similarity_stats_bwd",
    _INPUTS + ", Tensor row_lse, Tensor col_lse, Tensor kept, Tensor grad_rows, Tensor grad_cols,"
    " bool need_x, bool need_y) -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
    bwd_fake,
)
differentiate("similarity_stats", _save, _backward, _tangents)
