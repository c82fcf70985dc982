"""What ranks that may hold different experts tell each other in a step."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from m3bind.parallel import world
from m3bind.parallel.placement import Placement


def exchange(own: dict[str, Tensor], count: int, placement: Placement) -> dict[str, Tensor]:
    """Every expert's embeddings [count, D] of ``count`` texts, on every rank.

    ``own`` holds, for each expert of this rank, those of `Placement.share(count)` [n, D]. Every
    rank is expected to compute the same loss of all of them: the gradient of its own rows is then
    what it needs, and nothing is sent in the backward pass. They get as many times their gradient
    as ranks share the expert, since DDP and FSDP take the mean over these.
    """
    if world.size() == 1:
        return own
    stacked = torch.stack([own[m] for m in placement.own])  # [K, n, D]
    longest = max(-(-count // len(ranks)) for ranks in placement.owners.values())
    found = _Exchange.apply(stacked, longest, placement.size)  # [W, K, longest, D]
    whole = {}
    for modality, ranks in placement.owners.items():
        place = 0 if len(placement.own) == 1 else placement.modalities.index(modality)
        sizes = [count * (i + 1) // len(ranks) - count * i // len(ranks) for i in range(len(ranks))]
        parts = [found[r, place, :n] for r, n in zip(ranks, sizes, strict=True)]
        whole[modality] = torch.cat(parts)
    return whole


def squared_norm(gradients: Iterable[Tensor], placement: Placement) -> float:
    """Of gradients of the experts' parameters, over all experts; each is averaged, as DDP and
    FSDP do, over the ranks that hold it."""
    total = 0.0
    for gradient in gradients:
        if placement.size > 1:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=placement.group)
            gradient = gradient / placement.size
        total += float(gradient.double().square().sum())
    return world.totals(total / placement.size)[0]


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, longest: int, factor: int) -> Tensor:
        ctx.count, ctx.factor = own.shape[1], factor
        sent = own.new_zeros(own.shape[0], longest, *own.shape[2:])
        sent[:, : own.shape[1]] = own
        found = sent.new_empty(world.size() * sent.shape[0], *sent.shape[1:])
        dist.all_gather_into_tensor(found, sent)
        return found.view(world.size(), *sent.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[world.rank(), :, : ctx.count] * ctx.factor, None, None
