"""Losses of a batch that several ranks hold together."""

from m3bind.distributed.clip import clip_loss
from m3bind.distributed.distill import similarity_distill
from m3bind.distributed.groups import world_size
from m3bind.distributed.siglip import siglip_loss

__all__ = ["clip_loss", "siglip_loss", "similarity_distill", "world_size"]


def require_one_rank(name: str, world_size: int, instead: str) -> None:
    pass
