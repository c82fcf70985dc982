"""similarity_topk: exact order with plenty of ties, what is left out, NaN, gradients."""

import subprocess
import sys

import pytest
import torch
from clip_oracle import needs_native, unit_pairs
from properties import given, settings, st
from search_oracle import ALL, FAST, TYPED, check, integers, orders, some_ids, want_topk

from m3bind import chunked
from m3bind.ops import similarity_rank, similarity_topk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, M, D, k). Tiles are 6 or 14 queries by 8, 16 or 32 columns; sums are cut at 256 features.
CASES = (
    (1, 1, 1, 1),  # one of everything
    (3, 5, 2, 9),  # k beyond the gallery
    (14, 32, 7, 32),  # one tile, all of it
    (15, 33, 3, 4),  # one more than a tile
    (29, 700, 257, 10),  # two sums; nothing is a multiple of anything
    (5, 1500, 2, 1024),  # the largest k; nearly all tie
)


@pytest.mark.parametrize(("n", "m", "d", "k"), CASES)
@pytest.mark.parametrize(("backend", "dtype"), TYPED)
def test_exact_order_of_ties(backend, n, m, d, k, dtype):
    queries, gallery = integers(n, d, seed=0, dtype=dtype), integers(m, d, seed=1, dtype=dtype)
    for ids in (None, (some_ids(n, seed=2), some_ids(m, seed=3))):
        got = similarity_topk(queries, gallery, k, exclude_ids=ids, backend=backend)
        assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check(got, want_topk(orders(queries, gallery, ids), k))


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 120),
    d=st.integers(1, 20),
    k=st.integers(1, 130),
    kinds=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("backend", ALL)
def test_any_shape(backend, n, m, d, k, kinds, seed):
    queries, gallery = integers(n, d, seed=seed), integers(m, d, seed=seed + 1)
    ids = some_ids(n, seed=seed, kinds=kinds), some_ids(m, seed=seed + 2, kinds=kinds)
    got = similarity_topk(queries, gallery, k, exclude_ids=ids, backend=backend)
    check(got, want_topk(orders(queries, gallery, ids), k))


def across_panels(backend, monkeypatch):
    """Puts borders of panels everywhere: 8 x 8 in chunked; cpp has them every 32 columns anyway."""
    if backend == "chunked":
        monkeypatch.setattr(chunked.search, "PANEL_ROWS", 8)
        monkeypatch.setattr(chunked.search, "PANEL_ELEMENTS", 64)


@pytest.mark.parametrize("k", (1, 5, 20))
@pytest.mark.parametrize(("backend", "dtype"), TYPED)
def test_ties_across_the_borders_of_panels(backend, k, dtype, monkeypatch):
    across_panels(backend, monkeypatch)
    # Three values only, so that every border cuts a group, and the k-th place lies within one.
    queries, gallery = integers(19, 1, seed=0, dtype=dtype), integers(90, 1, seed=1, dtype=dtype)
    ids = some_ids(19, seed=2), some_ids(90, seed=3)
    for excluded in (None, ids):
        got = similarity_topk(queries, gallery, k, exclude_ids=excluded, backend=backend)
        check(got, want_topk(orders(queries, gallery, excluded), k))


@needs_native
def test_equal_rows_tie_wherever_they_stand():
    # Real numbers: a library's product rounds a ragged last panel in another order.
    queries, rows = unit_pairs(23, 300, seed=0)
    gallery = rows.repeat(40, 1)
    values, indices = similarity_topk(queries, gallery, 50, backend="cpp")
    best = similarity_topk(queries, rows, 2, backend="cpp")[1]
    first = best[:, :1] + len(rows) * torch.arange(40)
    assert torch.equal(indices[:, :40], first)
    assert (values[:, :40] == values[:, :1]).all()
    alone = torch.cat([similarity_topk(q[None], gallery, 50, backend="cpp")[0] for q in queries])
    assert torch.equal(values, alone)  # the size of the batch changes no bit


@needs_native
def test_several_steps_and_blocks_of_the_native_kernels():
    # With 5000 features a block holds some 1600 queries, a step some 200 columns.
    queries, gallery = integers(1700, 5000, seed=0), integers(450, 5000, seed=1)
    got = similarity_topk(queries, gallery, 7, backend="cpp")
    values, indices = (queries.double() @ gallery.double().T).sort(
        dim=1, descending=True, stable=True
    )
    check(got, (values[:, :7], indices[:, :7]))


def near_each_other():
    x, noise = unit_pairs(6000, 600, seed=0)
    return x[torch.arange(6000) % 20] + 1e-4 * noise  # apart by less than bfloat16 can tell


def of_all_sizes():
    x, _ = unit_pairs(6000, 600, seed=0)
    return x * 10.0 ** torch.linspace(-44, 38, 6000)[torch.randperm(6000)][:, None]


def with_values_that_are_not_finite():
    x, _ = unit_pairs(6000, 600, seed=0)
    for row, value in ((2500, torch.nan), (3000, torch.inf), (4000, -torch.inf), (5999, 3.4e38)):
        x[row, row % 600] = value
    return x


GALLERIES = {
    "random": lambda: unit_pairs(6000, 600, seed=0)[0],
    "odd": lambda: unit_pairs(6000, 601, seed=0)[0],
    "near each other": near_each_other,
    "rising": lambda: unit_pairs(6000, 600, seed=0)[0] * torch.linspace(0.1, 2, 6000)[:, None],
    "of all sizes": of_all_sizes,
    "not finite": with_values_that_are_not_finite,
    "halves": lambda: unit_pairs(6000, 600, seed=0, dtype=torch.float16)[0],
    "rounded": lambda: unit_pairs(6000, 600, seed=0, dtype=torch.bfloat16)[0],
}


@needs_native
@pytest.mark.parametrize("name", GALLERIES)
def test_the_first_look_loses_nothing(name):
    # Where the processor has bfloat16 products, columns from 256 * k on, for ranks 128 * P, are
    # first looked at in them. So ranks with 50 slots are counted in float32.
    torch.manual_seed(0)
    gallery = GALLERIES[name]()
    queries = gallery[torch.randperm(6000)[:200]].clone()
    queries[:3] = 0
    queries[3:60] *= -1
    values, indices = similarity_topk(queries, gallery, 4, backend="cpp")
    labels = torch.full((200, 50), -1)
    labels[:, :4], labels[:, 4:8] = indices, torch.randint(0, 6000, (200, 4))
    ids = torch.arange(200) % 5, torch.arange(6000) % 50
    for excluded in (None, ids):
        plain = similarity_rank(queries, gallery, labels, exclude_ids=excluded, backend="cpp")
        for slots in (slice(0, 1), slice(3, 6)):
            ranks = similarity_rank(
                queries, gallery, labels[:, slots], exclude_ids=excluded, backend="cpp"
            )
            assert torch.equal(ranks, plain[:, slots])
        if excluded is None:
            assert torch.equal(plain[:, :4], torch.arange(1, 5).expand(200, 4))
    exact = (queries.double()[:, None] * gallery.double()[indices]).sum(2)
    size = (queries.double()[:, None] * gallery.double()[indices]).abs().sum(2)
    finite = size < 3e38
    assert finite.sum() > 300
    assert ((values - exact).abs() <= 1e-6 * size + 1e-44)[finite].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", (1, 33, 512, 3000))
@pytest.mark.parametrize("backend", FAST)
def test_error_of_values_against_float64(backend, d, dtype):
    ours = plain = 0.0
    for seed in range(5):
        queries, gallery = unit_pairs(70, d, seed=seed, dtype=dtype)
        values, indices = similarity_topk(queries, gallery, 10, backend=backend)
        exact = (queries.double() @ gallery.double().T).gather(1, indices)
        usual = (queries.float() @ gallery.float().T).gather(1, indices)
        ours = max(ours, ((values - exact).norm() / exact.norm()).item())
        plain = max(plain, ((usual - exact).norm() / exact.norm()).item())
    assert ours <= 1.5 * plain + 3e-8


@pytest.mark.parametrize("backend", ALL)
def test_nan_is_never_dropped(backend):
    queries, gallery = integers(16, 3, seed=0), integers(100, 3, seed=1)
    queries[4, 1] = torch.nan
    gallery[70, 2] = gallery[33, 0] = torch.nan
    ids = torch.full((16,), -1), torch.arange(100)
    ids[0][4] = 1
    values, indices = similarity_topk(queries, gallery, 5, exclude_ids=ids, backend=backend)
    assert values[4].isnan().all() and indices[4].tolist() == [0, 2, 3, 4, 5]
    assert (indices[0].tolist()[:2], values[0, :2].isnan().all().item()) == ([33, 70], True)
    check((values, indices), want_topk(orders(queries, gallery, ids), 5))
    # More NaN than k, and torch.topk agrees that it is the largest.
    gallery[10:40] = torch.nan
    values, indices = similarity_topk(queries, gallery, 5, backend=backend)
    assert indices[0].tolist() == [10, 11, 12, 13, 14]
    assert (queries @ gallery.T).topk(5).values[0].isnan().all()


@pytest.mark.parametrize("backend", ALL)
def test_infinite_scores_and_signed_zeros(backend):
    gallery = torch.tensor([[0.0], [-0.0], [1e38], [-1e38], [-0.0], [0.0], [-1e38]])
    queries = torch.tensor([[1.0], [-1.0], [1e30], [-1e30], [0.0]])
    values, indices = similarity_topk(queries, gallery, 9, backend=backend)
    assert indices.tolist() == [
        [2, 0, 1, 4, 5, 3, 6, -1, -1],
        [3, 6, 0, 1, 4, 5, 2, -1, -1],
        [2, 0, 1, 4, 5, 3, 6, -1, -1],  # -inf is a score like others, and has its index
        [3, 6, 0, 1, 4, 5, 2, -1, -1],
        [0, 1, 2, 3, 4, 5, 6, -1, -1],
    ]
    assert values[2].tolist()[0] == torch.inf and (values[:, 7:] == -torch.inf).all()


@pytest.mark.parametrize("backend", ALL)
def test_a_query_does_not_find_itself(backend):
    x, _ = unit_pairs(40, 8, seed=0)
    _, indices = similarity_topk(x, x, 39, exclude_ids=torch.arange(40), backend=backend)
    assert not (indices == torch.arange(40)[:, None]).any()
    assert (indices.sort(1).values.diff(dim=1) > 0).all() and (indices >= 0).all()
    nothing = similarity_topk(x, x, 2, exclude_ids=torch.zeros(40).long(), backend=backend)
    assert (nothing[0] == -torch.inf).all() and (nothing[1] == -1).all()


@pytest.mark.parametrize("backend", ALL)
def test_empty(backend):
    x = torch.zeros(3, 5)
    values, indices = similarity_topk(x[:0], x, 2, backend=backend)
    assert values.shape == indices.shape == (0, 2)
    ids = torch.arange(3), torch.arange(0)
    for excluded in (None, ids):
        values, indices = similarity_topk(x, x[:0], 2, exclude_ids=excluded, backend=backend)
        assert (values == -torch.inf).all() and (indices == -1).all() and values.shape == (3, 2)


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs(backend):
    queries, gallery = integers(20, 6, seed=0), integers(70, 6, seed=1)
    wide = torch.zeros(6, 140)
    wide[:, ::2] = gallery.T
    strided = wide[:, ::2].T
    assert not strided.is_contiguous()
    turned = queries.T.contiguous().T
    ids = some_ids(40, seed=2)[::2], some_ids(70, seed=3)
    got = similarity_topk(turned, strided, 6, exclude_ids=ids, backend=backend)
    check(got, want_topk(orders(queries, gallery, ids), 6))


@pytest.mark.parametrize("backend", FAST)
def test_gradient_equals_the_references(backend):
    queries, gallery = unit_pairs(20, 9, seed=0)
    gallery = torch.cat([gallery, gallery[:5]])
    ids = some_ids(20, seed=0, kinds=2), some_ids(25, seed=1, kinds=2)
    weights = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    grads = []
    for name in (backend, "reference"):
        leaves = [t.clone().requires_grad_() for t in (queries, gallery)]
        values, indices = similarity_topk(*leaves, 40, exclude_ids=ids, backend=name)
        assert values.requires_grad and not indices.requires_grad
        there = indices >= 0
        assert 0 < there.sum() < there.numel()
        (values.where(there, 0) * weights).sum().backward()
        grads.append([t.grad for t in leaves])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_gradient_of_what_was_not_found_is_zero(backend):
    queries, gallery = torch.ones(2, 3, requires_grad=True), torch.full((2, 3), torch.nan)
    gallery.requires_grad_()
    ids = torch.zeros(2, dtype=torch.int64)
    similarity_topk(queries, gallery, 3, exclude_ids=ids, backend=backend)[0].sum().backward()
    assert (queries.grad == 0).all() and (gallery.grad == 0).all()
    queries.grad = None
    similarity_topk(queries, gallery, 3, backend=backend)[0][:, 0].sum().backward()
    assert queries.grad.isnan().all()
    empty = torch.zeros(0, 3, requires_grad=True)
    similarity_topk(queries, empty, 3, backend=backend)[0].sum().backward()
    assert empty.grad.shape == (0, 3)


@pytest.mark.parametrize("backend", FAST)
def test_memory_is_not_that_of_the_matrix(backend):
    # 3000 x 60,000 scores would be 687 MiB; a fresh process may grow by 250 MiB.
    code = (
        "import resource, torch; from m3bind.ops import similarity_topk; torch.set_num_threads(1)\n"
        "x, y = torch.randn(3000, 8), torch.randn(60000, 8)\n"
        f"similarity_topk(x[:40], y[:40], 5, backend='{backend}')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"similarity_topk(x, y, 5, backend='{backend}')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 250 * 1024
