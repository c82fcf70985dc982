"""What similarity_distill offers: masks, reductions, directions, dtypes; NaN, inf, nothing."""

import pytest
import torch
import torch.nn.functional as F
from clip_oracle import errors, needs_native
from distill_oracle import features, run, truth
from torch import Tensor

from m3bind.ops import similarity_distill

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
ALL = ("reference", *FAST)
KINDS = ("kl", "ce")


def masked_dense(s: Tensor, t: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the rows and which rows have a pair left, by a loop."""
    losses, valid = s.new_zeros(len(s)), torch.zeros(len(s), dtype=torch.bool)
    for i in range(len(s)):
        left = ~same[i]
        if left.any():
            p, q = t[i, left].softmax(0), s[i, left].log_softmax(0)
            losses[i], valid[i] = (p * (p.log() - q)).sum(), True
    return losses, valid


@pytest.mark.parametrize("scale", (14.3, 3000.0), ids=("", "own shifts"))
@pytest.mark.parametrize("which", ("some", "itself", "a whole row", "everything"))
@pytest.mark.parametrize("backend", ALL)
def test_masked_pairs_leave_both_distributions(backend, which, scale):
    x, y, teacher_x, teacher_y = (t.double() for t in features(30, 30, 7, 9, seed=0))
    row_ids, col_ids = {
        "some": (torch.arange(30) // 3, torch.arange(30) % 12),
        "itself": (torch.arange(30), torch.arange(30)),
        "a whole row": (torch.arange(30).clamp(max=1), torch.zeros(30, dtype=torch.int64)),
        "everything": (torch.zeros(30, dtype=torch.int64), torch.zeros(30, dtype=torch.int64)),
    }[which]
    leaves = [x, y, torch.tensor(scale, dtype=torch.float64)]
    for t in leaves:
        t.requires_grad_()
    s, t = leaves[2] * x @ y.T, 20.0 * teacher_x @ teacher_y.T
    same = row_ids[:, None] == col_ids
    rows, row_valid = masked_dense(s, t, same)
    cols, col_valid = masked_dense(s.T, t.T, same.T)
    weights = torch.randn(60, generator=torch.Generator().manual_seed(1)).double()
    want = [rows, cols]
    if row_valid.any():
        want += torch.autograd.grad((torch.cat([rows, cols]) * weights).sum(), leaves)
    narrow = torch.float64 if backend == "reference" else torch.float32
    mine = [t.detach().to(narrow).requires_grad_() for t in leaves]
    args = (*mine, teacher_x.to(narrow), teacher_y.to(narrow), 20.0)
    options = {"mask_ids": (row_ids, col_ids), "backend": backend}
    got = list(similarity_distill(*args, reduction="none", **options))
    got += torch.autograd.grad((torch.cat(got) * weights.to(narrow)).sum(), mine)
    for i, value in enumerate(got):
        if i >= len(want):
            assert (value == 0).all()
        else:
            norm = max(1.0, want[i].norm().item())
            assert (value.double() - want[i]).norm() < 5e-6 * norm * max(1.0, scale / 100), i
    mean = similarity_distill(*args, **options)
    assert mean.isnan() if not row_valid.any() else torch.isclose(
        mean.double(), (rows[row_valid].mean() + cols[col_valid].mean()) / 2, rtol=1e-4
    )  # fmt: skip


def test_one_tensor_of_ids_stands_for_both():
    x, y, teacher_x, teacher_y = features(12, 12, 5, 5, seed=0)
    ids = torch.arange(12) // 2
    one, two = (
        similarity_distill(x, y, 9.0, teacher_x, teacher_y, 9.0, mask_ids=given_ids)
        for given_ids in (ids, (ids, ids.clone()))
    )
    assert one == two


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ALL)
def test_reductions_and_directions(backend, kind):
    x, y, teacher_x, teacher_y = features(30, 21, 7, 5, seed=1)
    s, t = 5.0 * x @ y.T, 9.0 * teacher_x @ teacher_y.T
    want = []
    for a, b in ((s, t), (s.T, t.T)):
        entropy = (b.softmax(1) * b.log_softmax(1)).sum(1) if kind == "kl" else 0
        want.append(F.cross_entropy(a, b.softmax(1), reduction="none") + entropy)

    def call(**options):
        return similarity_distill(
            x, y, 5.0, teacher_x, teacher_y, torch.tensor([9.0]), kind=kind, backend=backend,
            **options,
        )  # fmt: skip

    close = torch.testing.assert_close
    rows, cols = call(reduction="none")
    close(rows, want[0], rtol=1e-5, atol=1e-6)
    close(cols, want[1], rtol=1e-5, atol=1e-6)
    close(call(), (rows.mean() + cols.mean()) / 2)
    close(call(reduction="sum"), (rows.sum() + cols.sum()) / 2)
    close(call(directions="rows"), rows.mean())
    close(call(directions="columns", reduction="sum"), cols.sum())
    close(call(directions="columns", reduction="none"), cols)


@pytest.mark.parametrize("backend", FAST)
def test_upstream_gradients_of_rows_and_columns(backend):
    given_features = features(70, 90, 9, 5, seed=2)
    weights = torch.randn(160, generator=torch.Generator().manual_seed(0))

    def weighted(*args, backend):
        both = similarity_distill(*args, reduction="none", backend=backend)
        return (torch.cat(both) * weights).sum()

    wide = tuple(t.double() for t in given_features)
    want = run(weighted, wide, 20.0, 14.0, backend="reference")
    got = run(weighted, given_features, 20.0, 14.0, backend=backend)
    assert max(errors(got, want).values()) < 2e-5


@pytest.mark.parametrize("backend", ALL)
def test_the_teacher_gets_no_gradient(backend):
    x, y, teacher_x, teacher_y = features(12, 9, 5, 4, seed=0)
    teacher = [t.requires_grad_() for t in (teacher_x, teacher_y, torch.tensor(7.0))]
    loss = similarity_distill(x.requires_grad_(), y, 5.0, *teacher, backend=backend)
    loss.backward()
    assert x.grad is not None and all(t.grad is None for t in teacher)


@pytest.mark.parametrize("backend", ALL)
def test_nan_in_gives_nan_out(backend):
    for spoil in range(4):
        given_features = features(20, 9, 7, 5, seed=0)
        given_features[spoil][2, 3] = torch.nan
        got = run(similarity_distill, given_features, 10.0, 10.0, backend=backend)
        for name, value in got.items():
            assert value.isnan().any(), (spoil, name)
    for scales in ((torch.nan, 1.0), (1.0, torch.nan)):
        got = run(similarity_distill, features(20, 9, 7, 5, seed=0), *scales, backend=backend)
        assert all(value.isnan().any() for value in got.values()), scales


@pytest.mark.parametrize("backend", ALL)
def test_infinite_features_are_never_silently_finite(backend):
    for spoil in range(4):
        given_features = features(20, 9, 7, 5, seed=0)
        given_features[spoil][3, 2] = torch.inf
        x, y, *teacher = given_features
        assert not similarity_distill(x, y, 10.0, *teacher, 10.0, backend=backend).isfinite()


@pytest.mark.parametrize("shape", ((0, 5), (5, 0), (0, 0)), ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_empty_batch_is_as_in_torch(backend, shape):
    x, y, teacher_x, teacher_y = features(*shape, 3, 4, seed=0)
    x.requires_grad_()
    args = (x, y, 1.0, teacher_x, teacher_y, 1.0)
    assert similarity_distill(*args, backend=backend).isnan()
    total = similarity_distill(*args, reduction="sum", backend=backend)
    assert total == 0
    total.backward()
    assert x.grad.shape == x.shape and not x.grad.any()


@pytest.mark.parametrize("student", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("teacher", (torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("backend", ("reference", "chunked", None))
def test_a_teacher_of_another_dtype_keeps_its_digits(backend, student, teacher):
    x, y, teacher_x, teacher_y = features(20, 30, 16, 8, seed=0)
    given = (x.to(student), y.to(student), teacher_x.to(teacher), teacher_y.to(teacher))
    want = truth(given, 14.0, 20.0)
    got = run(similarity_distill, given, 14.0, 20.0, backend=backend)
    assert got["loss"].dtype == (torch.float64 if teacher == torch.float64 else torch.float32)
    assert got["x"].dtype == got["y"].dtype == student and got["scale"].dtype == torch.float32
    assert abs(got["loss"] - want["loss"]) < 1e-6 * want["loss"]
    assert errors(got, want)["x"] < (5e-3 if student == torch.bfloat16 else 1e-6)
