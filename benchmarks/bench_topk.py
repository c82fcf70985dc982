"""similarity_topk beside faiss's flat index and plain PyTorch in panels.

    pytest --benchmark-only benchmarks/bench_topk.py

    M3BIND_BENCH_TOPK     queries x gallery x features, default 4096x1000000x512: 5 GiB of memory,
                          a minute or two a contestant and round; 1024x200000x512 takes seconds
    M3BIND_BENCH_THREADS  for torch and for faiss, default 1

As in bench_clip.py, the numbers to compare are those in `extra_info`: the contestants take turns.
All must find the same neighbours, but for scores that differ in the last bits alone.
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind import backends
from m3bind.ops import similarity_topk

NUM_QUERIES, NUM_ROWS, FEATURES = (
    int(part) for part in os.environ.get("M3BIND_BENCH_TOPK", "4096x1000000x512").split("x")
)
K = 10
ROUNDS = 3
THREADS = int(os.environ.get("M3BIND_BENCH_THREADS", "1"))
PANEL_COLUMNS = 8192  # the fastest of powers of two for plain PyTorch at the default size
CONTESTANTS = ("m3bind", "m3bind chunked", "torch panels", "faiss flat")

Search = Callable[[], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def threads():
    faiss = pytest.importorskip("faiss")
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@cache
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(NUM_QUERIES, FEATURES, generator=generator), dim=1)
    gallery = torch.randn(NUM_ROWS, FEATURES, generator=generator)
    return queries, F.normalize(gallery, dim=1, out=gallery)


def torch_panels() -> tuple[Tensor, Tensor]:
    queries, gallery = features()
    values = queries.new_empty(NUM_QUERIES, 0)
    indices = values.long()
    for first in range(0, NUM_ROWS, PANEL_COLUMNS):
        panel = queries @ gallery[first : first + PANEL_COLUMNS].T
        new, at = panel.topk(min(K, panel.shape[1]))
        values, best = torch.cat([values, new], 1).topk(min(K, values.shape[1] + new.shape[1]))
        indices = torch.cat([indices, at + first], 1).gather(1, best)
    return values, indices


@cache
def contestant(name: str) -> Search:
    queries, gallery = features()
    if name == "torch panels":
        return torch_panels
    if name == "faiss flat":
        index = pytest.importorskip("faiss").IndexFlatIP(FEATURES)
        index.add(gallery.numpy())

        def search():
            values, indices = index.search(queries.numpy(), K)
            return torch.from_numpy(values), torch.from_numpy(indices)

        return search
    backend = "chunked" if name == "m3bind chunked" else None
    return lambda: similarity_topk(queries, gallery, K, backend=backend)


@cache
def in_turns() -> dict[str, list[float]]:
    """Seconds of every contestant, taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(ROUNDS):
        found = {}
        for name in CONTESTANTS:
            run = contestant(name)
            start = time.perf_counter()
            found[name] = run()
            seconds[name].append(time.perf_counter() - start)
        if number == 0:
            values, indices = found["m3bind"]
            for other_values, other_indices in found.values():
                torch.testing.assert_close(other_values, values, rtol=1e-5, atol=1e-6)
                assert (other_indices == indices).float().mean() > 0.999
    return seconds


@pytest.mark.parametrize("name", CONTESTANTS)
def test_similarity_topk(benchmark, name):
    benchmark.group = f"similarity_topk fp32 {NUM_QUERIES} x {NUM_ROWS} D={FEATURES} k={K}"
    turns = in_turns()
    best = {key: min(seconds) for key, seconds in turns.items()}
    benchmark.extra_info.update(
        device="cpu",
        backend=backends.resolve("similarity_topk", "cpu", torch.float32)
        if name == "m3bind"
        else name,
        threads=THREADS,
        torch=torch.__version__,
        flop=2 * NUM_QUERIES * NUM_ROWS * FEATURES,
        in_turns_min_ms=1e3 * best[name],
        in_turns_median_ms=1e3 * statistics.median(turns[name]),
        times_faiss=best[name] / best["faiss flat"],
    )
    benchmark.pedantic(contestant(name), rounds=1)
