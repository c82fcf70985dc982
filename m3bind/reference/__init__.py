"""The operators in plain PyTorch with the whole similarity matrix: the oracle of every test.

Everything here is differentiable any number of times, and exact in float64.
"""

from m3bind.reference.clip import clip_loss, reduce
from m3bind.reference.distill import similarity_distill
from m3bind.reference.lse import similarity_lse
from m3bind.reference.search import similarity_rank, similarity_topk
from m3bind.reference.siglip import siglip_loss

__all__ = [
    "clip_loss",
    "reduce",
    "siglip_loss",
    "similarity_distill",
    "similarity_lse",
    "similarity_rank",
    "similarity_topk",
]
