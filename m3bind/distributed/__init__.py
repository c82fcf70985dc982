"""Losses of a batch that several ranks hold together."""

from m3bind.distributed.clip import clip_loss
from m3bind.distributed.groups import world_size

__all__ = ["clip_loss", "world_size"]


def require_one_rank(name: str, world_size: int, instead: str) -> None:
    pass
