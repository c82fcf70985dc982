"""The operators in plain PyTorch, a panel of rows at a time: O(N + M) memory on any device, beside
what is to be kept."""

from m3bind.chunked.distill import similarity_distill_bwd, similarity_distill_fwd
from m3bind.chunked.search import similarity_rank_fwd, similarity_topk_bwd, similarity_topk_fwd
from m3bind.chunked.siglip import siglip_bwd, siglip_fwd, siglip_total_fwd
from m3bind.chunked.stats import similarity_stats_bwd, similarity_stats_fwd

__all__ = [
    "siglip_bwd",
    "siglip_fwd",
    "siglip_total_fwd",
    "similarity_distill_bwd",
    "similarity_distill_fwd",
    "similarity_rank_fwd",
    "similarity_stats_bwd",
    "similarity_stats_fwd",
    "similarity_topk_bwd",
    "similarity_topk_fwd",
]
