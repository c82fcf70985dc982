"""similarity_rank and similarity_topk in Triton: sorted lists of exact scores, ties, tiles.

On the CPU under the interpreter (see test_triton_interpreter.py), on a GPU where there is one.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from clip_oracle import unit_pairs
from crossed import crossed, slow
from search_oracle import check, integers, orders, some_ids, want_ranks, want_topk
from torch import Tensor

from m3bind.ops import similarity_rank, similarity_topk
from m3bind_kernels import launch, rank, search, topk, tuning
from m3bind_kernels.configs import Config

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, M, D). The interpreter's tiles are 64 x 64 x 64.
SHAPES = (
    (1, 1, 1),  # one of everything
    (3, 5, 2),  # a corner of a tile
    (64, 64, 64),  # exactly a tile
    (65, 129, 65),  # one more than tiles
    (29, 700, 130),  # many tiles of columns; nothing is a multiple of anything
)
# Tiles that are longer than wide and wider than long, and other steps over the features.
TILES = (
    Config(16, 64, 32, 4, 1, piece=16),
    Config(64, 16, 16, 4, 1, piece=16),
    Config(32, 32, 128, 4, 1, piece=32),
)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def moved(ids: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    return None if ids is None else (ids[0].to(DEVICE), ids[1].to(DEVICE))


def ranks(queries, gallery, labels, ids=None) -> Tensor:
    queries, gallery, labels = (t.to(DEVICE) for t in (queries, gallery, labels))
    return similarity_rank(queries, gallery, labels, exclude_ids=moved(ids), backend="triton").cpu()


def some_labels(n: int, m: int, p: int, *, seed: int = 4) -> Tensor:
    return torch.randint(-2, m, (n, p), generator=torch.Generator().manual_seed(seed))


def both_ids(n: int, m: int) -> tuple[Tensor, Tensor]:
    # Ids below 0 and above 2^32 are ids like others.
    return (some_ids(n, seed=2) - 3) << 33, (some_ids(m, seed=3, kinds=9) - 3) << 33


@pytest.mark.parametrize(("shape", "dtype"), crossed(SHAPES, DTYPES), ids=str)
def test_exact_rank_among_ties(shape, dtype):
    n, m, d = shape
    queries, gallery = integers(n, d, seed=0, dtype=dtype), integers(m, d, seed=1, dtype=dtype)
    for ids in (None, both_ids(n, m)):
        found = orders(queries, gallery, ids)
        for slots in (1, 3):
            labels = some_labels(n, m, slots)
            assert torch.equal(ranks(queries, gallery, labels, ids), want_ranks(found, labels))


@pytest.mark.parametrize("config", TILES, ids=str)
def test_every_column_with_other_tiles(config, monkeypatch):
    monkeypatch.setattr(tuning, "for_device", lambda *_: [config])
    monkeypatch.setattr(rank, "MOST_TILES", 1)  # bands of one block of queries
    # Three values only, so that every border of tiles cuts a group of equal scores.
    queries, gallery = integers(19, 1, seed=0), integers(70, 1, seed=1)
    labels = torch.arange(0, 70, 5).expand(19, 14)
    for ids in (None, both_ids(19, 70)):
        want = want_ranks(orders(queries, gallery, ids), labels)
        assert torch.equal(ranks(queries, gallery, labels, ids), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_last_bit_of_the_positives_score(dtype):
    x, _ = unit_pairs(150, 123, seed=0, dtype=dtype)
    # A dot product of its own would differ in the last bit, and cost half of the queries this rank.
    assert (ranks(x, x, torch.arange(150)) == 1).all()
    # Equal rows have equal scores wherever they stand: the copies of a row have consecutive ranks.
    gallery, copies = x.repeat(5, 1), torch.arange(0, 750, 150)
    got = ranks(x, gallery, torch.randperm(150)[:, None] + copies)
    assert torch.equal(got - got[:, :1], torch.arange(5).expand(150, 5))


def test_nan_infinity_and_signed_zeros_in_ranks():
    queries, gallery = integers(16, 3, seed=0), integers(100, 3, seed=1)
    queries[4, 1] = torch.nan
    gallery[70, 2] = gallery[33, 0] = torch.nan
    labels = torch.arange(100).expand(16, 100)
    for ids in (None, both_ids(16, 100)):
        want = want_ranks(orders(queries, gallery, ids), labels)
        assert torch.equal(ranks(queries, gallery, labels, ids), want)
    gallery = torch.tensor([[0.0], [-0.0], [1e38], [-1e38], [-0.0], [0.0], [-1e38]])
    queries = torch.tensor([[1.0], [-1.0], [1e30], [-1e30], [0.0]])
    labels = torch.arange(7).expand(5, 7)
    want = want_ranks([sorted_as_float32(q, gallery) for q in queries], labels)
    assert torch.equal(ranks(queries, gallery, labels), want)


def sorted_as_float32(query: Tensor, gallery: Tensor) -> list[tuple[float, int]]:
    scores = (query * gallery)[:, 0].tolist()
    return sorted(((score, j) for j, score in enumerate(scores)), key=lambda it: (-it[0], it[1]))


def test_no_rank_where_nothing_can_be_found():
    queries, gallery = integers(6, 4, seed=0), integers(30, 4, seed=1)
    labels = torch.tensor([0, -1, -(2**40), 29, 7, 8])
    ids = torch.full((6,), -1), torch.arange(30)
    ids[0][4] = 7  # what it should find is left out
    got = ranks(queries, gallery, labels, ids)
    assert (got == 0).tolist() == [False, True, True, False, True, False]
    assert torch.equal(got[:, None], want_ranks(orders(queries, gallery, ids), labels[:, None]))
    assert ranks(queries, gallery[:0], labels.clamp(max=-1)).tolist() == [0] * 6
    assert ranks(queries[:0], gallery, labels[:0], (ids[0][:0], ids[1])).shape == (0,)
    assert ranks(queries, gallery, labels[:, None][:, :0]).shape == (6, 0)


def test_descriptors_and_pointers_agree_in_ranks(monkeypatch):
    x, y = unit_pairs(150, 40, seed=0, dtype=torch.bfloat16)
    labels = some_labels(150, 150, 2)
    results = []
    for described in (True, False):
        monkeypatch.setattr(launch, "can_describe", lambda device, d=described: d)
        results.append(ranks(x, y, labels))
    assert torch.equal(*results)


def test_strided_inputs_and_opcheck_of_ranks():
    queries, gallery = integers(20, 6, seed=0).to(DEVICE), integers(70, 6, seed=1)
    wide = torch.zeros(70, 12)
    wide[:, ::2] = gallery
    labels = some_labels(20, 70, 6)[:, ::2]
    ids = some_ids(40, seed=2)[::2], some_ids(70, seed=3)
    got = ranks(queries.T.contiguous().T, wide.to(DEVICE)[:, ::2], labels.to(DEVICE), ids)
    assert torch.equal(got, want_ranks(orders(queries.cpu(), gallery, ids), labels))
    forward = torch.ops.m3bind.similarity_rank_fwd.default
    labels, more = some_labels(20, 20, 2).to(DEVICE), some_ids(20, seed=0).to(DEVICE)
    for query_ids in (None, more):
        torch.library.opcheck(forward, (queries, queries, labels, query_ids, query_ids, "triton"))


def test_a_gallery_of_too_many_rows_is_refused(monkeypatch):
    monkeypatch.setattr(search, "MOST_COLUMNS", 29)
    x = integers(30, 2, seed=0)
    with pytest.raises(ValueError, match="at most 29 rows, not 30; search parts of it"):
        ranks(x, x, torch.arange(30))


def best(queries, gallery, k, ids=None) -> tuple[Tensor, Tensor]:
    values, indices = similarity_topk(
        queries.to(DEVICE), gallery.to(DEVICE), k, exclude_ids=moved(ids), backend="triton"
    )
    assert values.dtype == torch.float32
    return values.cpu(), indices.cpu()


@pytest.mark.parametrize(("shape", "dtype"), crossed(SHAPES, DTYPES), ids=str)
def test_exact_order_of_ties(shape, dtype):
    n, m, d = shape
    queries, gallery = integers(n, d, seed=0, dtype=dtype), integers(m, d, seed=1, dtype=dtype)
    for ids in (None, both_ids(n, m)):
        found = orders(queries, gallery, ids)
        for k in (1, 150):  # beyond most of the galleries
            check(best(queries, gallery, k, ids), want_topk(found, k))


def test_the_largest_k():
    queries, gallery = integers(5, 2, seed=0), integers(1500, 2, seed=1)  # nearly all tie
    ids = torch.arange(5), torch.arange(1500)
    for number in (1023, 1024):
        want = want_topk(orders(queries, gallery, ids), number)
        check(best(queries, gallery, number, ids), want)


@pytest.mark.parametrize(("config", "parts"), list(zip(TILES, (1, 3, 100), strict=True)), ids=str)
def test_the_order_depends_on_no_tile(config, parts, monkeypatch):
    monkeypatch.setattr(tuning, "for_device", lambda *_: [config])
    monkeypatch.setattr(topk, "num_parts_for", lambda *_: parts)
    monkeypatch.setattr(topk, "SPACE_BYTES", 0)  # bands of one block of queries
    queries, gallery = integers(40, 1, seed=0), integers(150, 1, seed=1)
    for ids in (None, both_ids(40, 150)):
        found = orders(queries, gallery, ids)
        for k in (1, 20):
            check(best(queries, gallery, k, ids), want_topk(found, k))


def test_parts_keep_every_multiprocessor_busy():
    assert topk.num_parts_for(1, 1, 132, 1000) == topk.num_parts_for(133, 8000, 132, 0) == 1
    for tiles_n, tiles_m, most in ((1, 8000, 1000), (133, 8000, 8), (9, 50, 100), (264, 1000, 4)):
        blocks = tiles_n * topk.num_parts_for(tiles_n, tiles_m, 132, most)
        assert blocks / (132 * -(-blocks // 132)) > 0.85


@pytest.mark.parametrize("k", (1, 33, 150))
def test_galleries_in_every_order(k):
    # Ascending scores: every row of the gallery is above the limit, at every tile.
    numbers = torch.arange(600.0)
    gallery = torch.stack([numbers, numbers.flip(0), numbers % 7, torch.zeros(600)], 1)
    queries = torch.cat([torch.eye(4), -torch.eye(4)])
    check(best(queries, gallery, k), want_topk(orders(queries, gallery), k))


@pytest.mark.parametrize("dtype", (*DTYPES[:2], slow(DTYPES[2])), ids=str)
def test_equal_rows_are_found_in_order(dtype):
    x, _ = unit_pairs(70, 123, seed=0, dtype=dtype)
    gallery, copies = x.repeat(9, 1), torch.arange(0, 630, 70)
    values, indices = best(x, gallery, 20)
    assert torch.equal(indices[:, :9], torch.arange(70)[:, None] + copies)
    assert (values[:, :9] == values[:, :1]).all()
    # What is found at which place is what the ranks say.
    places = torch.arange(1, 21).expand(70, 20)
    assert torch.equal(ranks(x, gallery, indices), places)
    exact = (x.double() @ gallery.double().T).gather(1, indices)
    usual = (x.float() @ gallery.float().T).gather(1, indices)
    assert (values - exact).norm() <= 1.5 * (usual - exact).norm() + 3e-8 * exact.norm()


def test_nan_comes_first_and_is_never_dropped():
    queries, gallery = integers(16, 3, seed=0), integers(300, 3, seed=1)
    queries[4, 1] = torch.nan
    gallery[270, 2] = gallery[33, 0] = torch.nan
    ids = torch.full((16,), -1), torch.arange(300)
    ids[0][4] = 1
    for k in (1, 2, 5, 60):
        check(best(queries, gallery, k, ids), want_topk(orders(queries, gallery, ids), k))
    gallery[10:140] = torch.nan  # more than k
    check(best(queries, gallery, 5), want_topk(orders(queries, gallery), 5))


def test_infinity_and_signed_zeros_in_topk():
    gallery = torch.tensor([[0.0], [-0.0], [1e38], [-1e38], [-0.0], [0.0], [-1e38]])
    queries = torch.tensor([[1.0], [-1.0], [1e30], [-1e30], [0.0]])
    values, indices = best(queries, gallery, 9)
    found = [sorted_as_float32(q, gallery) for q in queries]
    check((values, indices), want_topk(found, 9))
    # -inf is a score like others, and has its index; what is not there has none.
    assert values[2, 5:].tolist() == [-torch.inf] * 4 and indices[2, 5:].tolist() == [3, 6, -1, -1]


def test_nothing_to_find():
    x = integers(40, 5, seed=0)
    own = torch.arange(40)
    _, indices = best(x, x, 39, (own, own))
    assert torch.equal(
        indices.sort(1).values, want_topk(orders(x, x, (own, own)), 39)[1].sort(1)[0]
    )
    assert not (indices == own[:, None]).any()
    for gallery, ids in ((x, (own * 0, own * 0)), (x[:0], None), (x[:0], (own, own[:0]))):
        values, indices = best(x, gallery, 2, ids)
        assert values.shape == (40, 2) and (values == -torch.inf).all() and (indices == -1).all()
    assert best(x[:0], x, 2)[1].shape == (0, 2)


def test_gradient_strides_and_opcheck_of_topk():
    queries, gallery = unit_pairs(20, 9, seed=0)
    ids = some_ids(20, seed=0, kinds=2), some_ids(20, seed=1, kinds=2)
    grads = []
    for backend in ("triton", "reference"):
        leaves = [t.T.contiguous().T.to(DEVICE).requires_grad_() for t in (queries, gallery)]
        values, indices = similarity_topk(*leaves, 15, exclude_ids=moved(ids), backend=backend)
        (values.where(indices >= 0, 0) * torch.arange(15.0, device=DEVICE)).sum().backward()
        grads.append([t.grad for t in leaves])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    forward = torch.ops.m3bind.similarity_topk_fwd.default
    for given in (moved(ids), (None, None)):
        torch.library.opcheck(forward, (*leaves, 25, *given, "triton"))


def test_descriptors_and_pointers_agree_in_topk(monkeypatch):
    x, y = unit_pairs(150, 40, seed=0, dtype=torch.bfloat16)
    results = []
    for described in (True, False):
        monkeypatch.setattr(launch, "can_describe", lambda device, d=described: d)
        results.append(best(x, y, 9))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
