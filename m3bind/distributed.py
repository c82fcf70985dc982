"""What losses know of other processes: how many there are."""

import torch


def world_size() -> int:
    """The ranks of the default process group; 1 without one."""
    group = torch.distributed
    return group.get_world_size() if group.is_available() and group.is_initialized() else 1


def require_one_rank(name: str, world_size: int, instead: str) -> None:
    """Raises the ValueError of a loss `name` that is asked to reach over several ranks."""
    if world_size != 1:
        raise ValueError(
            f"{name}: world_size={world_size}: losses over several ranks are not in this "
            f"version yet; use world_size=1, or {instead}"
        )
