"""similarity_rank: exact ranks with plenty of ties, and its agreement with similarity_topk."""

import pytest
import torch
from clip_oracle import unit_pairs
from properties import given, settings, st
from search_oracle import ALL, FAST, TYPED, integers, orders, some_ids, want_ranks

from m3bind import chunked
from m3bind.ops import similarity_rank, similarity_topk

# (N, M, D, P); see test_similarity_topk.py for the sizes.
CASES = (
    (1, 1, 1, 1),
    (3, 5, 2, 7),
    (14, 32, 7, 1),
    (15, 33, 3, 3),
    (29, 700, 257, 2),
)


def some_labels(n: int, m: int, p: int, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, m, (n, p), generator=generator)


@pytest.mark.parametrize(("n", "m", "d", "p"), CASES)
@pytest.mark.parametrize(("backend", "dtype"), TYPED)
def test_exact_rank_among_ties(backend, n, m, d, p, dtype):
    queries, gallery = integers(n, d, seed=0, dtype=dtype), integers(m, d, seed=1, dtype=dtype)
    labels = some_labels(n, m, p, seed=4)
    for ids in (None, (some_ids(n, seed=2), some_ids(m, seed=3))):
        got = similarity_rank(queries, gallery, labels, exclude_ids=ids, backend=backend)
        assert got.dtype == torch.int64
        assert torch.equal(got, want_ranks(orders(queries, gallery, ids), labels))


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 120),
    d=st.integers(1, 20),
    p=st.integers(1, 5),
    kinds=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("backend", ALL)
def test_any_shape(backend, n, m, d, p, kinds, seed):
    queries, gallery = integers(n, d, seed=seed), integers(m, d, seed=seed + 1)
    ids = some_ids(n, seed=seed, kinds=kinds), some_ids(m, seed=seed + 2, kinds=kinds)
    labels = some_labels(n, m, p, seed=seed)
    got = similarity_rank(queries, gallery, labels, exclude_ids=ids, backend=backend)
    assert torch.equal(got, want_ranks(orders(queries, gallery, ids), labels))


@pytest.mark.parametrize("backend", FAST)
def test_borders_of_panels(backend, monkeypatch):
    if backend == "chunked":
        monkeypatch.setattr(chunked.search, "PANEL_ROWS", 8)
        monkeypatch.setattr(chunked.search, "PANEL_ELEMENTS", 64)
    queries, gallery = integers(19, 1, seed=0), integers(90, 1, seed=1)
    labels = torch.arange(90).expand(19, 90)  # every column of every query
    for ids in (None, (some_ids(19, seed=2), some_ids(90, seed=3))):
        got = similarity_rank(queries, gallery, labels, exclude_ids=ids, backend=backend)
        assert torch.equal(got, want_ranks(orders(queries, gallery, ids), labels))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_a_query_in_its_own_gallery_has_rank_one(backend, dtype):
    # A dot product of its own would differ in the last bit, and cost half of the queries this rank.
    x, _ = unit_pairs(700, 123, seed=0, dtype=dtype)
    ranks = similarity_rank(x, x, torch.arange(700), backend=backend)
    values, _ = similarity_topk(x, x, 2, backend=backend)
    clear = values[:, 0] > values[:, 1] + 0.05
    assert clear.sum() > 600
    assert (ranks[clear] == 1).all()


@pytest.mark.parametrize("backend", FAST)
def test_found_by_topk_exactly_where_the_rank_says(backend):
    queries, gallery = unit_pairs(300, 77, seed=0)
    gallery = torch.cat([gallery, gallery, gallery + 1e-7])
    ids = some_ids(300, seed=0), some_ids(900, seed=1)
    labels = some_labels(300, 900, 4, seed=2)
    _, indices = similarity_topk(queries, gallery, 100, exclude_ids=ids, backend=backend)
    ranks = similarity_rank(queries, gallery, labels, exclude_ids=ids, backend=backend)
    places = indices[:, None, :] == labels[:, :, None]  # [N, P, k]
    found = places.any(2) & (labels >= 0)
    assert found.sum() > 50
    assert torch.equal(found, (ranks >= 1) & (ranks <= 100))
    assert torch.equal(places.int().argmax(2)[found] + 1, ranks[found])


@pytest.mark.parametrize("backend", ALL)
def test_rank_zero_and_the_recipes_of_the_docstring(backend):
    queries, gallery = integers(12, 4, seed=0), integers(30, 4, seed=1)
    labels = torch.arange(12)
    labels[3], labels[5] = -100, 7
    ids = torch.full((12,), -1), torch.arange(30)
    ids[0][5] = 7  # what it should find is left out
    ranks = similarity_rank(queries, gallery, labels, exclude_ids=ids, backend=backend)
    assert ranks.shape == (12,) and (ranks == 0).nonzero().flatten().tolist() == [3, 5]
    there = ranks > 0
    _, found = similarity_topk(queries, gallery, 10, exclude_ids=ids, backend=backend)
    hits = (found == labels[:, None]).any(1)[there]
    assert (ranks[there] <= 10).float().mean() == hits.float().mean()
    assert ranks[there].median() == sorted(ranks[there].tolist())[4]


@pytest.mark.parametrize("backend", ALL)
def test_nan_is_the_largest_score(backend):
    queries, gallery = integers(16, 3, seed=0), integers(100, 3, seed=1)
    queries[4, 1] = torch.nan
    gallery[70, 2] = gallery[33, 0] = torch.nan
    labels = torch.tensor([0, 33, 70, 99]).repeat(16, 1)
    ids = some_ids(16, seed=2), some_ids(100, seed=3)
    for excluded in (None, ids):
        got = similarity_rank(queries, gallery, labels, exclude_ids=excluded, backend=backend)
        assert torch.equal(got, want_ranks(orders(queries, gallery, excluded), labels))
    got = similarity_rank(queries, gallery, labels, backend=backend)
    assert got[0].tolist()[1:3] == [1, 2] and got[4].tolist() == [1, 34, 71, 100]


@pytest.mark.parametrize(
    "backend", (pytest.param("chunked", marks=pytest.mark.slow), FAST[1]), ids=str
)
def test_more_than_2_to_the_31_pairs(backend):
    torch.manual_seed(0)
    queries, gallery = torch.ones(60000, 1), torch.randperm(40000).float()[:, None]
    queries[::2] = -1
    labels = torch.randint(0, 40000, (60000,))
    wanted = gallery[labels, 0].long()
    wanted = torch.where(queries[:, 0] > 0, 40000 - wanted, wanted + 1)
    assert torch.equal(similarity_rank(queries, gallery, labels, backend=backend), wanted)
    _, found = similarity_topk(queries, gallery, 2, backend=backend)
    ordered = gallery[:, 0].argsort()
    assert torch.equal(found[::2], ordered[:2].expand(30000, 2))
    assert torch.equal(found[1::2], ordered[-2:].flip(0).expand(30000, 2))


@pytest.mark.parametrize("backend", ALL)
def test_empty(backend):
    x = torch.zeros(3, 5)
    none = torch.full((3,), -1)
    assert similarity_rank(x[:0], x, none[:0], backend=backend).shape == (0,)
    assert similarity_rank(x, x[:0], none, backend=backend).tolist() == [0, 0, 0]
    assert similarity_rank(x, x, none[:, None][:, :0], backend=backend).shape == (3, 0)


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs(backend):
    queries, gallery = integers(20, 6, seed=0), integers(70, 6, seed=1)
    wide = torch.zeros(70, 12)
    wide[:, ::2] = gallery
    labels = some_labels(20, 70, 6, seed=2)[:, ::2]
    got = similarity_rank(queries.T.contiguous().T, wide[:, ::2], labels, backend=backend)
    assert torch.equal(got, want_ranks(orders(queries, gallery), labels))


def test_ranks_have_no_gradient():
    x = integers(9, 4, seed=0).requires_grad_()
    assert not similarity_rank(x, x, torch.arange(9)).requires_grad
