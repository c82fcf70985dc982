"""Which ranks hold the batch."""

from __future__ import annotations  # torch may be built without ProcessGroup

from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor

from m3bind.distributed.exchange import Channel
from m3bind.ops import arguments

Group: TypeAlias = Any  # ProcessGroup, DeviceMesh of one dimension, or None


def world_size(group: Group = None) -> int:
    """The ranks of a group (default: the default process group); 1 without one."""
    return dist.get_world_size(process_group(group)) if _running() else 1


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def process_group(group: Group) -> dist.ProcessGroup | None:
    """The group itself; of a mesh, the group of its only dimension."""
    if group is None or not hasattr(group, "get_group"):
        return group
    if group.ndim != 1:
        raise ValueError(
            f"group is a DeviceMesh of {group.ndim} dimensions, {group.mesh_dim_names}; pass the "
            "one over which the batch is spread: mesh['name']"
        )
    return group.get_group()


def channel_of(group: Group) -> Channel | None:
    """The group's channel; None where the batch is in one piece."""
    if not _running():
        return None
    chosen = process_group(group)
    if chosen is None:
        chosen = dist.group.WORLD
    assert chosen is not None
    if dist.get_rank(chosen) < 0:
        raise ValueError("this process is not a member of the group that it passed")
    return Channel(chosen) if dist.get_world_size(chosen) > 1 else None


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, without importing what makes them."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "placements")


def meeting_place(named: dict[str, Any], group: Group) -> Group:
    """The group over which DTensors are sharded, whatever else is wrong with them: the ranks tell
    each other there."""
    if group is not None:
        return group
    sharded = (value for value in named.values() if is_sharded(value))
    mesh = next((t.device_mesh for t in sharded if t.device_mesh.ndim == 1), None)
    return None if mesh is None else mesh.get_group()


def local(op: str, named: dict[str, Any], group: Group) -> dict[str, Any]:
    """This rank's rows of DTensors that are sharded over this group."""
    if not any(is_sharded(value) for value in named.values()):
        return named
    from torch.distributed.tensor import Shard

    found: dict[str, Any] = {}
    for name, value in named.items():
        if not is_sharded(value):
            raise ValueError(
                f"{op}: {name} is no DTensor, as others of {', '.join(named)} are; pass all of "
                "them as DTensors, or `to_local()` of each"
            )
        mesh, placements = value.device_mesh, value.placements
        if mesh.ndim != 1 or placements[0] != Shard(0):
            raise ValueError(
                f"{op}: {name} is a DTensor placed {tuple(placements)} on a mesh of {mesh.ndim} "
                "dimensions; redistribute it to (Shard(0),) on a mesh of one dimension"
            )
        if group is not None and process_group(group) != mesh.get_group():
            raise ValueError(
                f"{op}: {name} is sharded over another group than the one that was passed or than "
                "the other features; leave `group` out, or redistribute it"
            )
        found[name] = value.to_local(grad_placements=[Shard(0)])
    return found


def refuse_sharded(op: str, given: dict[str, Any]) -> None:
    """Beside the features there are no DTensors: each rank passes what goes with its own rows."""
    for name, value in given.items():
        for part in value if isinstance(value, tuple | list) else (value,):
            if is_sharded(part):
                raise ValueError(
                    f"{op}: {name} is a DTensor; pass this rank's part of it, `to_local()` where "
                    "it is sharded by rows"
                )


def scalar(op: str, name: str, value: Any, like: Tensor) -> Tensor:
    """A scale or bias: over ranks a number or a plain tensor, not a sharded one."""
    if is_sharded(value):
        raise ValueError(
            f"{op}: {name} is a DTensor; pass `{name}.full_tensor()`, or what the module's forward "
            "returns, which FSDP2 has gathered"
        )
    return arguments.scalar(op, name, value, like)
