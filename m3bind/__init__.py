"""Binds medical image modalities through text; contrastive losses that fit in memory."""

from m3bind import losses, ops
from m3bind.backends import use_backend
from m3bind.gradcache import GradCache
from m3bind.losses import ClipLoss, DistillClipLoss, SigLipLoss
from m3bind.ops import clip_loss, siglip_loss, similarity_distill

__version__ = "0.1.0"
__all__ = [
    "ClipLoss",
    "DistillClipLoss",
    "GradCache",
    "SigLipLoss",
    "clip_loss",
    "losses",
    "ops",
    "siglip_loss",
    "similarity_distill",
    "use_backend",
]
