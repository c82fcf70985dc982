"""Fused contrastive operators: a file for each public one, over primitives of the table."""

from m3bind.ops.clip import clip_loss
from m3bind.ops.distill import similarity_distill
from m3bind.ops.lse import similarity_lse
from m3bind.ops.rank import similarity_rank
from m3bind.ops.siglip import siglip_loss
from m3bind.ops.topk import similarity_topk

__all__ = [
    "clip_loss",
    "siglip_loss",
    "similarity_distill",
    "similarity_lse",
    "similarity_rank",
    "similarity_topk",
]
