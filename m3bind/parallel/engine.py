"""A task whose gradients are averaged over ranks: by DDP, or by FSDP2 with its parts spread."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from m3bind.config import PARALLEL
from m3bind.parallel import world


class Engine:
    """Trains ``task`` on the ranks of ``group`` (None: all) as one process would train it.

    Calling it is calling the task. ``how`` is "ddp", which holds the task whole on every rank, or
    "fsdp", which spreads its parameters, gradients and optimizer: layers of a list of layers are
    gathered when they are used, the rest for the length of a step. With one rank it is the task
    alone. Buffers, such as the statistics of a batch norm, are those of the group's first rank.
    """

    def __init__(self, task: nn.Module, how: str = "ddp", group: Any = None) -> None:
        if how not in PARALLEL:
            raise ValueError(f"parallel {how!r} is not one of {', '.join(PARALLEL)}")
        self.task, self.group, self.sharded = task, group, False
        self.call: Callable[..., Any] = task
        self.size = world.size(group)
        if self.size > 1 and how == "fsdp":
            self.sharded = True
            _shard(task, group)
        elif self.size > 1:
            # Otherwise DDP regroups gradients after its first step, and sums them in another order
            # from then on: a training that goes on would not repeat one that never stopped.
            self.call = DistributedDataParallel(
                _WithUnused(task), process_group=group, find_unused_parameters=True
            )

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """A forward and a backward pass; gradients are averaged in the last of several."""
        if self.sharded:
            self.task.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield
            return
        wrapped = isinstance(self.call, DistributedDataParallel) and not last
        with self.call.no_sync() if wrapped else nullcontext():  # type: ignore[attr-defined]
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The task with all its parameters, to call other methods of it than forward."""
        parts = [m for m in self.task.modules() if hasattr(m, "unshard")] if self.sharded else []
        for part in parts:
            part.unshard()  # type: ignore[operator]
        yield
        for part in parts:
            part.reshard()  # type: ignore[operator]

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The norm of the gradients of this group's parameters, the same on its ranks."""
        found = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(found)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def state(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Spread tensors put together: on the first rank of all, those of every group.

        Every rank must call it. Other ranks get nothing.
        """
        whole = {}
        for name, value in own.items():
            value = value.full_tensor() if hasattr(value, "full_tensor") else value
            if world.rank(self.group) == 0:
                whole[name] = value.detach()
        if world.size() == self.size:  # the first rank has it all
            return whole
        parts = world.objects_at_first({name: value.cpu() for name, value in whole.items()})
        return {name: value for part in parts or () for name, value in part.items()}

    def spread(self, own: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `state`: ``whole`` tensors, spread as those of ``own`` of that name are.

        What ``own`` does not have is left out: another rank holds it.
        """
        return {name: spread_as(own[name], whole[name]) for name in own if name in whole}


class _WithUnused(nn.Module):
    """The task beside a parameter that it does not use: DDP, told to look for some, would warn on
    every rank that it found none."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task
        self.unused = nn.Parameter(torch.zeros(1, device=next(task.parameters()).device))

    def forward(self, *args: Any) -> Any:
        return self.task(*args)


def spread_as(own: Tensor, whole: Tensor) -> Tensor:
    """``whole`` placed as ``own`` is; every rank has all of it, so nothing is sent."""
    if not hasattr(own, "placements") or own.shape != whole.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    like: Any = own
    placed = whole.to(own.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def scale_gradients(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """As `torch.nn.utils.clip_grads_with_norm_`, for a norm over other parameters as well."""
    factor = min(1.0, float(torch.tensor(limit) / (torch.tensor(norm) + 1e-6)))
    found = [p.grad for p in parameters if p.grad is not None]
    if found and math.isfinite(limit):
        torch._foreach_mul_(found, factor)


def _shard(task: nn.Module, group: Any) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    device_type = next(task.parameters()).device.type
    everyone: Any = dist.group.WORLD
    mesh = DeviceMesh.from_group(everyone if group is None else group, device_type)
    lists = [m for m in task.modules() if isinstance(m, nn.ModuleList)]
    for layer in (layer for layers in lists for layer in layers):
        if not hasattr(layer, "unshard") and type(layer).forward is not nn.Module.forward:
            fully_shard(layer, mesh=mesh)
    fully_shard(task, mesh=mesh)
