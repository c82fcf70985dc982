"""Towers under DDP and FSDP2: which modules synchronise gradients, and when."""

import functools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def owner(where: str, tower: Any) -> nn.Module:
    """The module that computes: a function could hide one that synchronises, or a batch norm."""
    inner = tower
    while isinstance(inner, functools.partial):
        inner = inner.func
    module = inner if isinstance(inner, nn.Module) else getattr(inner, "__self__", None)
    if not callable(tower) or not isinstance(module, nn.Module):
        raise ValueError(
            f"{where} is a {type(tower).__name__}: pass an nn.Module, a bound method of one, or a "
            "functools.partial of either; what needs no module (a normalisation) fits in `loss`"
        )
    return module


def _sharding_class() -> Any:
    """FSDP2's mixin, where something has been sharded at all: its import is slow."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def synchronising(where: str, module: nn.Module) -> list[Any]:
    """The modules within, itself included, that average gradients over ranks."""
    for part in module.modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise ValueError(f"{where} holds a FullyShardedDataParallel: use fully_shard (FSDP2)")
    kinds = DistributedDataParallel, _sharding_class()
    return [part for part in module.modules() if isinstance(part, kinds)]


def doubtful(owners: list[nn.Module], held: list[list[Any]]) -> list[list[Any]]:
    """Of each tower the modules that another tower holds as well: two methods of one module may
    each call another part of it. What a tower is itself, it calls."""
    times = Counter(module for modules in held for module in modules)
    return [
        [m for m in modules if times[m] > 1 and m is not own]
        for own, modules in zip(owners, held, strict=True)
    ]


@contextmanager
def called(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """Those that are called within the block."""
    found: set[nn.Module] = set()
    with ExitStack() as stack:
        for module in modules:
            hook = module.register_forward_pre_hook(lambda module, _: found.add(module))
            stack.callback(hook.remove)
        yield found


@contextmanager
def unsynchronised(modules: Iterable[Any]) -> Iterator[None]:
    """A forward and a backward pass whose gradients stay on this rank for now."""
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
            else:
                # Nothing tells what was set before; True is what FSDP2 begins with.
                stack.callback(module.set_requires_gradient_sync, True, recurse=False)
                module.set_requires_gradient_sync(False, recurse=False)
        yield


def agreed(numbers: list[int], modules: list[nn.Module]) -> list[int]:
    """The largest number of chunks of each module among the ranks that its parameters lie on:
    each of their forward passes gathers parameters, so all ranks must run as many."""
    by_mesh: dict[Any, list[int]] = {}
    for place, module in enumerate(modules):
        if any(p.requires_grad for p in module.parameters()):
            # What a forward pass without a graph left unsharded, an evaluation, tells no mesh; and
            # it would be gathered from the first backward pass on.
            for part in module.modules():
                if isinstance(part, _sharding_class()):
                    part.reshard()
        meshes = (getattr(p, "device_mesh", None) for p in module.parameters())
        mesh = next((found for found in meshes if found is not None), None)
        if mesh is not None:
            by_mesh.setdefault(mesh, []).append(place)
    numbers = list(numbers)
    for mesh, places in by_mesh.items():
        found = torch.tensor([numbers[place] for place in places], device=mesh.device_type)
        for dimension in range(mesh.ndim):
            dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
        for place, number in zip(places, found.tolist(), strict=True):
            numbers[place] = number
    return numbers
