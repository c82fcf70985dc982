"""similarity_lse: row and column log-sum-exp of a similarity matrix that is never materialised.

The primitive under the contrastive losses. Its schemas carry the backend's name, so that the
backward pass, which runs on other threads, uses the same backend as the forward pass.
"""

from typing import Any

import torch
from torch import Tensor

from m3bind import backends, reference
from m3bind.ops import arguments
from m3bind.reference import accumulation_dtype, statistics_dtype

FWD = "m3bind::similarity_lse_fwd"
BWD = "m3bind::similarity_lse_bwd"

torch.library.define(
    FWD,
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor? row_ids, Tensor? col_ids, str backend)"
    " -> (Tensor row_lse, Tensor col_lse)",
)
torch.library.define(
    BWD,
    "(Tensor x, Tensor y, Tensor logit_scale, Tensor? row_ids, Tensor? col_ids, Tensor row_lse,"
    " Tensor col_lse, Tensor grad_row, Tensor grad_col, bool need_x, bool need_y, str backend)"
    " -> (Tensor grad_x, Tensor grad_y, Tensor grad_scale)",
)


@torch.library.impl(FWD, "CompositeExplicitAutograd")
def _fwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = backends.implementation("similarity_lse", backend).similarity_lse_fwd
    return run(x, y, logit_scale, row_ids, col_ids)


@torch.library.register_fake(FWD)
def _fwd_fake(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    stats = statistics_dtype(x.device)
    return x.new_empty(x.shape[0], dtype=stats), y.new_empty(y.shape[0], dtype=stats)


@torch.library.impl(BWD, "CompositeExplicitAutograd")
def _bwd(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_lse: Tensor,
    col_lse: Tensor,
    grad_row: Tensor,
    grad_col: Tensor,
    need_x: bool,
    need_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = backends.implementation("similarity_lse", backend).similarity_lse_bwd
    return run(
        x, y, logit_scale, row_ids, col_ids, row_lse, col_lse, grad_row, grad_col, need_x, need_y
    )


@torch.library.register_fake(BWD)
def _bwd_fake(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_lse: Tensor,
    col_lse: Tensor,
    grad_row: Tensor,
    grad_col: Tensor,
    need_x: bool,
    need_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1])),
        y.new_empty((y.shape[0] if need_y else 0, y.shape[1])),
        x.new_empty((), dtype=accumulation_dtype(x.dtype)),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, y, logit_scale, row_ids, col_ids, ctx.backend = inputs
    ctx.save_for_backward(x, y, logit_scale, row_ids, col_ids, *output)


def _backward(ctx: Any, grad_row: Tensor, grad_col: Tensor) -> tuple:
    need_x, need_y, need_scale = ctx.needs_input_grad[:3]
    grad_x, grad_y, grad_scale = torch.ops.m3bind.similarity_lse_bwd(
        *ctx.saved_tensors, grad_row, grad_col, need_x, need_y, ctx.backend
    )
    return (
        grad_x if need_x else None,
        grad_y if need_y else None,
        grad_scale if need_scale else None,
        None,
        None,
        None,
    )


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "m3bind: fused operators have no double backward; pass backend='reference' for one"
    )


torch.library.register_autograd(FWD, _backward, setup_context=_save)
torch.library.register_autograd(BWD, _refuse)


def similarity_lse(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor | float,  # [] or [1]
    *,
    row_ids: Tensor | None = None,  # [N] int64
    col_ids: Tensor | None = None,  # [M] int64
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # [N], [M]
    """Row and column log-sum-exp of scaled similarities, in O(N + M) memory.

    Equivalent to::

        s = (logit_scale * x @ y.T).masked_fill(row_ids[:, None] == col_ids, -inf)
        return s.logsumexp(1), s.logsumexp(0)

    Args:
        x, y: float32, bfloat16, float16 (logits are formed in float32) or float64.
        logit_scale: the factor itself, not its logarithm; differentiable.
        row_ids, col_ids: both or none; pairs with equal ids are left out.
        backend: a name from `m3bind.backends.BACKENDS`; default: the fastest that can run.

    Returns:
        float32 (float64 for float64 features); -inf where nothing is left to sum.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown or unavailable backend.
    """
    op = "similarity_lse"
    x, y = arguments.features(op, x, y)
    scale = arguments.scalar(op, "logit_scale", logit_scale, x)
    if (row_ids is None) != (col_ids is None):
        raise ValueError(f"{op}: pass both row_ids and col_ids, or neither")
    if row_ids is not None and col_ids is not None:
        row_ids = arguments.ids(op, "row_ids", row_ids, x)
        col_ids = arguments.ids(op, "col_ids", col_ids, y)
    chosen = backends.resolve(op, x.device.type, x.dtype, backend)
    with torch.autocast(x.device.type, enabled=False):
        if chosen == "reference":
            return reference.similarity_lse(x, y, scale, row_ids, col_ids)
        lse = torch.ops.m3bind.similarity_lse_fwd(x, y, scale, row_ids, col_ids, chosen)
        acc = accumulation_dtype(x.dtype)
        return lse[0].to(acc), lse[1].to(acc)
