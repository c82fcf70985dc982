"""The operators in plain PyTorch, a panel of rows at a time: O(N + M) memory on any device."""

from m3bind.chunked.search import similarity_rank_fwd, similarity_topk_bwd, similarity_topk_fwd
from m3bind.chunked.stats import similarity_stats_bwd, similarity_stats_fwd

__all__ = [
    "similarity_rank_fwd",
    "similarity_stats_bwd",
    "similarity_stats_fwd",
    "similarity_topk_bwd",
    "similarity_topk_fwd",
]
