"""similarity_topk beside faiss's flat index and plain PyTorch in panels.

M3BIND_BENCH_TOPK: queries x gallery x features, 1024x200000x512 unless told; 4096x1000000x512 takes
5 GiB of memory and about a minute a contestant and round. All must find the same neighbours, but
for scores that differ in the last bits alone.
"""

import os
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from rows import report
from torch import Tensor
from turns import THREADS, Contestant, Taken, in_turns, ours, peer

from m3bind.ops import similarity_topk

NUM_QUERIES, NUM_ROWS, FEATURES = (
    int(part) for part in os.environ.get("M3BIND_BENCH_TOPK", "1024x200000x512").split("x")
)
K = 10
WARM_QUERIES = 64
PANEL_COLUMNS = 8192  # the fastest of powers of two for plain PyTorch at the largest size

Search = Callable[[Tensor], tuple[Tensor, Tensor]]


@cache
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(NUM_QUERIES, FEATURES, generator=generator), dim=1)
    gallery = torch.randn(NUM_ROWS, FEATURES, generator=generator)
    return queries, F.normalize(gallery, dim=1, out=gallery)


def torch_panels(queries: Tensor, gallery: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    values = queries.new_empty(len(queries), 0)
    indices = values.long()
    for first in range(0, len(gallery), PANEL_COLUMNS):
        panel = queries @ gallery[first : first + PANEL_COLUMNS].T
        new, at = panel.topk(min(k, panel.shape[1]))
        values, best = torch.cat([values, new], 1).topk(min(k, values.shape[1] + new.shape[1]))
        indices = torch.cat([indices, at + first], 1).gather(1, best)
    return values, indices


def faiss_flat() -> Search:
    faiss = peer("faiss", "faiss-cpu")
    index = faiss.IndexFlatIP(FEATURES)
    index.add(features()[1].numpy())

    def search(queries: Tensor) -> tuple[Tensor, Tensor]:
        faiss.omp_set_num_threads(THREADS)
        values, indices = index.search(queries.numpy(), K)
        return torch.from_numpy(values), torch.from_numpy(indices)

    return search


def m3bind(backend: str | None = None) -> Search:
    return lambda queries: similarity_topk(queries, features()[1], K, backend=backend)


SEARCHES = {
    "m3bind": (m3bind, f"{ours('similarity_topk')}, fp32"),
    "m3bind chunked": (partial(m3bind, "chunked"), "plain PyTorch in panels, fp32"),
    "torch panels": (
        lambda: lambda queries: torch_panels(queries, features()[1]),
        f"matmul and topk, panels of {PANEL_COLUMNS}, fp32",
    ),
    "faiss flat": (faiss_flat, "IndexFlatIP, fp32, one call for all queries"),
}


@cache
def turns() -> dict[str, Taken]:
    queries, _ = features()
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def contestant(name: str) -> Contestant:
        make, setting = SEARCHES[name]
        search = make()
        return Contestant(
            run=lambda: found.update({name: search(queries)}),
            setting=setting,
            warm_up=lambda: search(queries[:WARM_QUERIES]),
        )

    taken = in_turns({name: partial(contestant, name) for name in SEARCHES}, least=2)
    first = next(iter(found.values()), None)  # m3bind, unless it failed
    for name, (values, indices) in found.items():
        same = (indices == first[1]).float().mean() > 0.999
        if not same or not torch.allclose(values, first[0], rtol=1e-5, atol=1e-6):
            taken[name] = Taken(
                taken[name].setting, problem="failed: other neighbours than the first contestant's"
            )
    return taken


@pytest.mark.parametrize("name", SEARCHES)
def test_similarity_topk(benchmark, name):
    report(
        benchmark, f"similarity_topk fp32 {NUM_QUERIES} x {NUM_ROWS} D={FEATURES} k={K}", name,
        turns()[name], op="similarity_topk", kind="time", dtype="fp32", n=NUM_QUERIES,
        num_rows=NUM_ROWS, flop=2 * NUM_QUERIES * NUM_ROWS * FEATURES,
    )  # fmt: skip
