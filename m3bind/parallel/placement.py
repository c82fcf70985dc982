"""Which experts a rank holds, and with whom."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from m3bind.config import PLACEMENTS
from m3bind.errors import M3BindError
from m3bind.parallel import world


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """``own``: the modalities of this rank; ``group``: the ranks that hold them (None: all).

    ``owners`` gives of every modality the ranks that hold it, in their order.
    """

    modalities: tuple[str, ...]
    own: tuple[str, ...]
    group: Any
    owners: dict[str, tuple[int, ...]]

    @property
    def rank(self) -> int:
        """This process among those that hold the same experts."""
        return world.rank(self.group)

    @property
    def size(self) -> int:
        return world.size(self.group)

    @classmethod
    def of(cls, modalities: Sequence[str], how: str = "replicated") -> "Placement":
        """``replicated``: every rank holds all; ``split``: the ranks are divided, in their order
        and as evenly as they can be, into one group a modality.

        Every rank must call it. Raises M3BindError for fewer ranks than groups.
        """
        ranks, names = world.size(), tuple(modalities)
        if how == "replicated" or (how == "split" and ranks == 1 == len(names)):
            owners = dict.fromkeys(names, tuple(range(ranks)))
            return cls(modalities=names, own=names, group=None, owners=owners)
        if how != "split":
            raise ValueError(f"placement {how!r} is not one of {', '.join(PLACEMENTS)}")
        if ranks < len(names):
            raise M3BindError(
                f"placement=split needs a rank for each of {', '.join(names)}, and there are "
                f"{ranks}: start {len(names)} or more, or set placement=replicated"
            )
        bounds = [ranks * i // len(names) for i in range(len(names) + 1)]
        owners = {m: tuple(range(*bounds[i : i + 2])) for i, m in enumerate(names)}
        # Each rank makes every group, as torch demands.
        groups = {m: dist.new_group(list(members)) for m, members in owners.items()}
        (own,) = (m for m, members in owners.items() if world.rank() in members)
        return cls(modalities=names, own=(own,), group=groups[own], owners=owners)

    def share(self, count: int) -> slice:
        """This rank's part of ``count`` things that its group divides."""
        return slice(*(count * part // self.size for part in (self.rank, self.rank + 1)))
