"""The ranks of one training: who they are, what each holds, and whose gradients are averaged."""

from m3bind.parallel.engine import Engine
from m3bind.parallel.placement import Placement
from m3bind.parallel.rows import exchange, squared_norm
from m3bind.parallel.world import (
    device,
    first_before_others,
    gathered_objects,
    is_first,
    meet,
    meet_after,
    rank,
    size,
    started,
)

__all__ = [
    "Engine",
    "Placement",
    "device",
    "exchange",
    "first_before_others",
    "gathered_objects",
    "is_first",
    "meet",
    "meet_after",
    "rank",
    "size",
    "squared_norm",
    "started",
]
