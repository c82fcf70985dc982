"""The operators whose tiles are CUDA C++, see `hopper`; the rest of them is that of Triton's."""

from functools import partial

from m3bind_kernels import stats_bwd, stats_fwd

similarity_stats_fwd = partial(stats_fwd.similarity_stats_fwd, native=True)
similarity_stats_bwd = partial(stats_bwd.similarity_stats_bwd, native=True)
