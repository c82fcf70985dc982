"""The operators whose tiles are CUDA C++, see `hopper`; the rest of them is that of Triton's."""

from functools import partial

from m3bind_kernels import siglip_passes, stats_bwd, stats_fwd, topk

siglip_fwd = partial(siglip_passes.siglip_fwd, native=True)
siglip_bwd = partial(siglip_passes.siglip_bwd, native=True)
siglip_total_fwd = partial(siglip_passes.siglip_total_fwd, native=True)
similarity_stats_fwd = partial(stats_fwd.similarity_stats_fwd, native=True)
similarity_stats_bwd = partial(stats_bwd.similarity_stats_bwd, native=True)
similarity_topk_fwd = partial(topk.similarity_topk_fwd, native=True)
