"""Autograd over ranks. Each takes an anchor, a scalar with a gradient wherever any rank wants one:
so the backward pass, in which all ranks must take part, runs on all of them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from m3bind.distributed.exchange import Channel
from m3bind.distributed.schemes import Needs


class Paired(Function):
    """Statistics of this rank's rows over all columns, and of its columns over all rows."""

    @staticmethod
    def forward(
        ctx: Any,
        job: Any,
        scheme: Any,
        needs: Needs,
        wire: torch.dtype,
        anchor: Tensor,
        x: Tensor,
        y: Tensor,
        *scalars: Tensor,
    ) -> tuple[Tensor, Tensor]:  # [C, n], [C, m]
        sides = [x.to(wire), *job.more_x], [y.to(wire), *job.more_y]
        held = scheme.start(*sides, needs)
        parts, partial, kept = scheme.forward(job, *sides, held)
        rows = job.merged(parts)
        cols = rows.new_empty(0, y.shape[0])
        if partial is not None:
            cols = job.merged(scheme.channel.to_owners(partial, scheme.cols.counts))
        held = held + scheme.rest()
        ctx.job, ctx.scheme, ctx.needs = job, scheme, needs
        ctx.lengths = [len(sides[0]), len(sides[1]), len(scalars), len(held), len(kept)]
        ctx.dtypes = x.dtype, y.dtype
        ctx.save_for_backward(*sides[0], *sides[1], *scalars, *held, *kept, rows, cols)
        return rows, cols

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_cols: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        x, y, scalars, held, kept, (rows, cols) = (
            [saved.pop(0) for _ in range(length)] for length in (*ctx.lengths, 2)
        )
        scheme, needs, channel = ctx.scheme, ctx.needs, ctx.scheme.channel
        by_rows = channel.gather_in_call(ctx.job.carried(rows, grad_rows).T, scheme.rows.counts)
        by_cols = channel.gather(ctx.job.carried(cols, grad_cols).T, scheme.cols.counts)
        job = ctx.job.bound(scalars, by_rows.T.contiguous(), by_cols.T.contiguous())
        grad_x, grad_y, parts = scheme.backward(job, x, y, held, kept, needs)
        return (
            *(None,) * 5,
            grad_x.to(ctx.dtypes[0]) if needs.x else None,
            grad_y.to(ctx.dtypes[1]) if needs.y else None,
            *(g.to(s.dtype) for g, s in zip(parts, scalars, strict=True)),
        )


class KnownGradient(Function):
    """A sum over pairs whose gradient the forward pass forms: this rank's part of the sum."""

    @staticmethod
    def forward(
        ctx: Any, job: Any, scheme: Any, needs: Needs, anchor: Tensor, x: Tensor, y: Tensor,
        *scalars: Tensor,
    ) -> Tensor:  # []  # fmt: skip
        held = scheme.start([x], [y], needs)
        held = held + scheme.rest()
        grad_x, grad_y, (total, *parts) = scheme.backward(job, [x], [y], held, [], needs)
        ctx.needs, ctx.dtypes = needs, (x.dtype, y.dtype)
        ctx.save_for_backward(grad_x, grad_y, *parts)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Only the product is rounded to 16 bit: it may hold a GradScaler's factor.
        grad_x, grad_y, *parts = (known * grad for known in ctx.saved_tensors)
        return (
            *(None,) * 4,
            grad_x.to(ctx.dtypes[0]) if ctx.needs.x else None,
            grad_y.to(ctx.dtypes[1]) if ctx.needs.y else None,
            *parts,
        )


class Weighted(Function):
    """The values themselves, with `factor` times their gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Total(Function):
    """The sum over ranks, in their order, of values of which each rank's share has the gradient."""

    @staticmethod
    def forward(ctx: Any, channel: Channel, values: Tensor) -> Tensor:
        return channel.stack(values).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class OwnColumns(Function):
    """This rank's part [m] of the sum over ranks of values [M]."""

    @staticmethod
    def forward(ctx: Any, channel: Channel, counts: list[int], values: Tensor) -> Tensor:
        ctx.channel, ctx.counts = channel, counts
        return channel.to_owners(values[None], counts).sum(0)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.channel.gather(grad, ctx.counts)


class SummedGradient(Function):
    """A scalar whose gradient is added up over ranks: the true one, where each has W times its
    part."""

    @staticmethod
    def forward(ctx: Any, channel: Channel, anchor: Tensor, value: Tensor) -> Tensor:
        ctx.channel = channel
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        channel = ctx.channel
        found = channel.gather_in_call(grad.reshape(1, 1), [1] * channel.size)
        return None, None, (found.sum(0) / channel.size).reshape(grad.shape)
