"""A task whose gradients are averaged over ranks: by DDP, or by FSDP2 with its parts spread."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from m3bind.config import PARALLEL
from m3bind.parallel import world


class _Root(nn.Module):
    """The task in what ranks share, so that whatever is computed with it runs within a forward."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task

    def forward(self, call: Callable[..., Any], *args: Any) -> Any:
        return call(*args)


class Engine:
    """Trains ``task`` on the ranks of ``group`` (None: all) as one process would train it.

    Calling it is calling the task. ``how`` is "ddp", which holds the task whole on every rank, or
    "fsdp", which spreads its parameters, gradients and optimizer: layers of a list of layers are
    gathered when they are used, the rest for the length of a step. With one rank it is the task
    alone. Of buffers, such as the statistics of a batch norm, those of the group's first rank are
    kept.
    """

    def __init__(self, task: nn.Module, how: str = "ddp", group: Any = None) -> None:
        if how not in PARALLEL:
            raise ValueError(f"parallel {how!r} is not one of {', '.join(PARALLEL)}")
        self.task, self.group, self.size = task, group, world.size(group)
        self.sharded = self.size > 1 and how == "fsdp"
        self.root: Any = _Root(task)
        if self.sharded:
            _shard(self.root, group)
        elif self.size > 1:
            # DDP looks for parameters that are not used: otherwise it would regroup gradients after
            # its first step, and sum them in another order from then on, so that a training that
            # goes on would not repeat one that never stopped. It warns where it finds none.
            self.root.unused = nn.Parameter(torch.zeros(1, device=next(task.parameters()).device))
            self.root = DistributedDataParallel(
                self.root, process_group=group, find_unused_parameters=True
            )

    def __call__(self, *args: Any) -> Any:
        return self.root(self.task, *args)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """A forward and a backward pass; gradients are averaged in the last of several."""
        if self.sharded:
            self.root.set_requires_gradient_sync(last)
        waits = isinstance(self.root, DistributedDataParallel) and not last
        with self.root.no_sync() if waits else nullcontext():
            yield

    def whole(self, call: Callable[[], Any]) -> Any:
        """What ``call`` returns, which may use any method of the task, as often as it likes.

        Ranks need not call alike: all parameters are gathered before, and freed after.
        """
        if not self.sharded:
            return call()
        parts = [m for m in self.root.modules() if hasattr(m, "unshard") and m is not self.root]

        def gathered() -> Any:
            for part in parts:
                part.unshard()
            return call()

        self.root.set_reshard_after_forward(False)
        try:
            return self.root(gathered)
        finally:
            for part in (*parts, self.root):
                part.reshard()
                part.set_reshard_after_forward(part is not self.root, recurse=False)

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The norm of the gradients of this group's parameters, the same on its ranks."""
        found = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(found)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def scale_gradients(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """As `torch.nn.utils.clip_grads_with_norm_`, for a norm over other parameters as well."""
    factor = min(1.0, float(torch.tensor(limit) / (torch.tensor(norm) + 1e-6)))
    found = [p.grad for p in parameters if p.grad is not None]
    if found and math.isfinite(limit):
        torch._foreach_mul_(found, factor)


def _shard(root: nn.Module, group: Any) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    device_type = next(root.parameters()).device.type
    everyone: Any = dist.group.WORLD
    mesh = DeviceMesh.from_group(everyone if group is None else group, device_type)
    lists = [m for m in root.modules() if isinstance(m, nn.ModuleList)]
    for layer in (layer for layers in reversed(lists) for layer in layers):  # inner ones first
        if not hasattr(layer, "unshard") and type(layer).forward is not nn.Module.forward:
            fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
