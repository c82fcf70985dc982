"""Peers and our drop-ins for them, in each rank."""

from typing import Any

import torch
import torch.distributed as dist
from cases import unit
from torch import Tensor, nn

from m3bind import losses
from m3bind.integrations import inf_cl


def modules(name: str, ours: bool, counts: list[int]) -> dict[str, Any]:
    """open_clip's losses, with gradients that flow through its gathering."""
    import open_clip.loss

    rank, size = dist.get_rank(), dist.get_world_size()
    source = losses if ours else open_clip.loss
    more = {} if name == "SigLipLoss" else {"gather_with_grad": True}
    module = getattr(source, name)(rank=rank, world_size=size, **more)
    x, y, *teacher = (unit(sum(counts), 8, seed).split(counts)[rank] for seed in range(4))
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    given = {"ClipLoss": (), "SigLipLoss": (bias,), "DistillClipLoss": (*teacher, 11.0)}[name]
    found = module(x, y, scale, *given)
    loss = sum(found) if isinstance(found, tuple) else found
    loss.backward()
    grads = {"x": x.grad, "y": y.grad, "scale": scale.grad, "bias": bias.grad}
    return {"loss": loss.detach(), **{k: g for k, g in grads.items() if g is not None}}


def inf_cl_rows(name: str, counts: list[int], labels: list[Tensor] | None) -> dict[str, Any]:
    rank = dist.get_rank()
    q, k = (unit(sum(counts), 8, seed).split(counts)[rank].clone() for seed in (0, 1))
    q, k, scale = q.requires_grad_(), k.requires_grad_(), torch.tensor(9.0, requires_grad=True)
    loss = getattr(inf_cl, name)(q, k, None if labels is None else labels[rank], scale)
    loss.backward()
    return {"loss": loss.detach(), "x": q.grad, "y": k.grad, "scale": scale.grad}


class _Model(nn.Module):
    """A table of embeddings in the place of sentence-transformers' model."""


def sentences(ours: bool, columns: int, options: dict[str, Any]) -> dict[str, Any]:
    from sentence_transformers.sentence_transformer import losses as theirs

    from m3bind.integrations import sentence_transformers as here

    rank, size = dist.get_rank(), dist.get_world_size()
    kind = (here if ours else theirs).MultipleNegativesRankingLoss
    loss_fn = kind(_Model(), gather_across_devices=True, **options)
    leaves = [
        (3 * unit(5 * size, 8, seed)).split(5)[rank].clone().requires_grad_()
        for seed in range(columns)
    ]
    loss = loss_fn.compute_loss_from_embeddings(leaves, torch.empty(0))
    loss.backward()
    return {"loss": loss.detach(), **{str(i): leaf.grad for i, leaf in enumerate(leaves)}}
