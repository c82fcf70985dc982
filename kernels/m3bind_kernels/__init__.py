"""Triton kernels of m3bind. This package imports torch and triton only."""

from m3bind_kernels.distill_bwd import similarity_distill_bwd
from m3bind_kernels.distill_fwd import similarity_distill_fwd
from m3bind_kernels.rank import similarity_rank_fwd
from m3bind_kernels.siglip_passes import siglip_bwd, siglip_fwd, siglip_total_fwd
from m3bind_kernels.stats_bwd import similarity_stats_bwd
from m3bind_kernels.stats_fwd import similarity_stats_fwd
from m3bind_kernels.topk import similarity_topk_fwd

__all__ = [
    "siglip_bwd",
    "siglip_fwd",
    "siglip_total_fwd",
    "similarity_distill_bwd",
    "similarity_distill_fwd",
    "similarity_rank_fwd",
    "similarity_stats_bwd",
    "similarity_stats_fwd",
    "similarity_topk_fwd",
]
