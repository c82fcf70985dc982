"""similarity_topk beside faiss's flat index and plain PyTorch in panels.

M3BIND_BENCH_TOPK: queries x gallery x features, 1024x200000x512 unless told; 4096x1000000x512 takes
5 GiB of memory and a minute or two a contestant and round. All must find the same neighbours, but
for scores that differ in the last bits alone. See turns.py for which numbers to compare.
"""

import os
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from turns import THREADS, in_turns, record

from m3bind.ops import similarity_topk

NUM_QUERIES, NUM_ROWS, FEATURES = (
    int(part) for part in os.environ.get("M3BIND_BENCH_TOPK", "1024x200000x512").split("x")
)
K = 10
ROUNDS = 3
PANEL_COLUMNS = 8192  # the fastest of powers of two for plain PyTorch at the largest size
CONTESTANTS = ("m3bind", "m3bind chunked", "torch panels", "faiss flat")

Search = Callable[[], tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def faiss_threads():
    faiss = pytest.importorskip("faiss")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(THREADS)
    yield
    faiss.omp_set_num_threads(before)


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
def turns() -> dict[str, list[float]]:
    found = {name: contestant(name)() for name in CONTESTANTS}
    values, indices = found["m3bind"]
    for other_values, other_indices in found.values():
        torch.testing.assert_close(other_values, values, rtol=1e-5, atol=1e-6)
        assert (other_indices == indices).float().mean() > 0.999
    return in_turns({name: contestant(name) for name in CONTESTANTS}, ROUNDS)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_similarity_topk(benchmark, name):
    benchmark.group = f"similarity_topk fp32 {NUM_QUERIES} x {NUM_ROWS} D={FEATURES} k={K}"
    flop = 2 * NUM_QUERIES * NUM_ROWS * FEATURES
    record(benchmark, name, turns(), op="similarity_topk", flop=flop, against="faiss flat")
    benchmark.pedantic(contestant(name), rounds=1)
