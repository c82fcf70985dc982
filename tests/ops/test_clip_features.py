"""Every feature of clip_loss: values and gradients against float64, row by row."""

from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from clip_oracle import errors, in_a_cone, needs_native, run, unit_pairs
from feature_oracle import cases, feature_loss

from m3bind.ops import clip_loss

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
ALL = ("reference", *FAST)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURES = list(cases(2, 2, 1, 0))
# (N, M, D, scale): one row; less than a vector; ragged, more columns than rows.
SHAPES = ((1, 1, 7, 20.0), (5, 9, 3, 20.0), (41, 67, 33, 30.0))
# Beside 1.5 x plain PyTorch's own error, worst of the seeds.
TOLERANCE = {"loss": 4e-7, "x": 6e-7, "y": 6e-7, "scale": 4e-6}


def features(n: int, m: int, d: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, y = unit_pairs(m, d, seed=seed, noise=2.0, dtype=dtype)
    return x[:n].clone(), y


def widened(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What the operator sees of them after rounding to the features' dtype, in float64."""
    negatives = arguments.get("negatives")
    return (
        arguments if negatives is None else arguments | {"negatives": negatives.to(dtype).double()}
    )


@lru_cache(15)  # the other backend asks for the same
def truth_and_formula(n, m, d, scale, seed, dtype, feature):
    x, y = features(n, m, d, seed, dtype)
    arguments = cases(n, m, d, seed)[feature]
    exact = widened(arguments, dtype)
    want = run(partial(feature_loss, **exact), x.double(), y.double(), torch.tensor(scale).item())
    return want, run(partial(clip_loss, **arguments, backend="reference"), x, y, scale)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64(backend, dtype, feature):
    for n, m, d, scale in SHAPES:
        worst: dict[str, list[float]] = {name: [0.0, 0.0] for name in TOLERANCE}
        for seed in range(5):
            x, y = features(n, m, d, seed, dtype)
            arguments = cases(n, m, d, seed)[feature]
            want, plain = truth_and_formula(n, m, d, scale, seed, dtype, feature)
            ours = run(partial(clip_loss, **arguments, backend=backend), x, y, scale)
            if want["loss"].isnan():  # no row, or no column, has a positive
                assert ours["loss"].isnan()
                continue
            for name, pair in worst.items():
                pair[0] = max(pair[0], errors(ours, want)[name])
                pair[1] = max(pair[1], errors(plain, want)[name])
        tolerance = TOLERANCE
        if "soft targets" in feature:
            # The target's logit is a dot product of its own: it cancels but for its rounding.
            tolerance = TOLERANCE | {
                "loss": 2**-22 * scale,
                "x": 2**-23 * scale,
                "y": 2**-23 * scale,
            }
        for name, (mine, plain_torch) in worst.items():
            assert mine <= 1.5 * plain_torch + tolerance[name], (n, name, mine, plain_torch)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_is_exact_in_float64(feature):
    n, m, d, scale = SHAPES[-1]
    x, y = features(n, m, d, 3, torch.float64)
    arguments = widened(cases(n, m, d, 3)[feature], torch.float64)
    want = run(partial(feature_loss, **arguments), x, y, scale)
    got = run(partial(clip_loss, **arguments, backend="reference"), x, y, scale)
    assert max(errors(got, want).values()) < 1e-12


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", FAST)
def test_every_row_and_its_upstream_gradient(backend, feature):
    n, m, d, scale = SHAPES[-1]
    x, y = features(n, m, d, 7, torch.float32)
    arguments = cases(n, m, d, 7)[feature]
    weights = torch.randn(n + m, generator=torch.Generator().manual_seed(0))

    def weighted(x, y, scale, *, loss, **arguments):
        out = loss(x, y, scale, reduction="none", **arguments)
        out = torch.cat(out) if isinstance(out, tuple) else out
        return (out * weights[: len(out)]).sum()

    exact = widened(arguments, torch.float32)
    want = run(partial(weighted, loss=feature_loss, **exact), x.double(), y.double(), scale)
    ours, plain = (
        errors(run(partial(weighted, loss=clip_loss, backend=b, **arguments), x, y, scale), want)
        for b in (backend, "reference")
    )
    for name, error in ours.items():
        assert error <= 1.5 * plain[name] + 2e-6, (name, error, plain[name])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", FAST)
def test_more_than_one_panel(backend, feature):
    n, m, d, scale = 1030, 1100, 5, 20.0
    x, y = features(n, m, d, 1, torch.float32)
    arguments = cases(n, m, d, 1)[feature]
    want = run(
        lambda *a: clip_loss(*a, **widened(arguments, torch.float32), backend="reference"),
        x.double(), y.double(), scale,
    )  # fmt: skip
    got = run(partial(clip_loss, **arguments, backend=backend), x, y, scale)
    for name, error in errors(got, want).items():
        assert error < 5e-6, (name, error)


@pytest.mark.parametrize("scale", (0.0, -15.0), ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", FAST)
def test_scales_that_are_not_positive(backend, feature, scale):
    n, m, d, _ = SHAPES[-1]
    x, y = features(n, m, d, 2, torch.float32)
    arguments = cases(n, m, d, 2)[feature]
    exact = widened(arguments, torch.float32)
    want = run(partial(feature_loss, **exact), x.double(), y.double(), scale)
    got = run(partial(clip_loss, **arguments, backend=backend), x, y, scale)
    for name, value in want.items():
        assert (got[name].double() - value).norm() <= 1e-5 * value.norm() + 1e-6, name


@pytest.mark.parametrize("backend", FAST)
def test_separated_rows_keep_their_gradient_whatever_names_the_positive(backend):
    """Twelve prototypes, four rows each: the rows' losses are of the size 1e-20."""
    prototypes = torch.linalg.qr(torch.randn(32, 12, dtype=torch.float64)).Q.T
    labels = torch.arange(48) % 12
    x = (prototypes[labels] + 0.01 * torch.randn(48, 32)).float()
    y = prototypes.float()
    ids = {"labels": {"labels": labels}, "ids": {"positive_ids": (labels, torch.arange(12))}}
    for arguments in ids.values():
        logits = 60.0 * x.double() @ y.double().T
        positive = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf)
        want = torch.log1p((others - positive).exp().sum(1))
        x.requires_grad_()
        rows = clip_loss(
            x, y, 60.0, directions="rows", reduction="none", backend=backend, **arguments
        )
        assert 0 < want.max() < 1e-15
        assert ((rows.double() - want).abs() < 5e-5 * want).all()
        (grad,) = torch.autograd.grad(rows.sum(), x)
        weight = (others - positive).exp()
        exact = 60.0 * (weight @ y.double() - weight.sum(1, keepdim=True) * y.double()[labels])
        assert (grad - exact).norm() < 5e-5 * exact.norm()


@pytest.mark.parametrize("backend", FAST)
def test_features_under_compile(backend):
    n, m, d, scale = SHAPES[-1]
    x, y = features(n, m, d, 0, torch.float32)
    for name in ("labels", "everything with classes", "everything with soft targets"):
        arguments = cases(n, m, d, 0)[name]
        torch._dynamo.reset()
        step = partial(clip_loss, **arguments, backend=backend)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        eager = run(step, x, y, scale)
        for key, value in run(compiled, x, y, scale).items():
            torch.testing.assert_close(value, eager[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_gradients_of_negatives(backend):
    x, y = unit_pairs(12, 5, seed=0)
    for shape in ((4, 5), (12, 3, 5)):
        extra = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        exact = extra.detach().double().requires_grad_()
        scale = torch.tensor(9.0, dtype=torch.float64)
        feature_loss(x.double(), y.double(), scale, negatives=exact).backward()
        clip_loss(x, y, 9.0, negatives=extra, backend=backend).backward()
        assert (extra.grad - exact.grad).norm() < 2e-6 * exact.grad.norm()


@pytest.mark.parametrize("backend", FAST)
def test_nothing_to_average(backend):
    x, y = (t.requires_grad_() for t in unit_pairs(6, 4, seed=0))
    labels = torch.full((6,), -100)
    assert clip_loss(x, y, 5.0, labels=labels, backend=backend).isnan()
    total = clip_loss(x, y, 5.0, labels=labels, reduction="sum", backend=backend)
    total.backward()
    assert total == 0 and (x.grad == 0).all() and (y.grad == 0).all()


BAD_CALLS = {
    "label": ({"labels": torch.tensor([0, 1, 6, 2, 3, 4])}, "contains 6, but there are 6 columns"),
    "label type": ({"labels": torch.zeros(6)}, "labels must be an int64 tensor, not torch.float32"),
    "two kinds": (
        {"labels": torch.arange(6), "positive_ids": torch.arange(6)}, "exclude each other"
    ),
    "ids": ({"mask_ids": (torch.arange(6),)}, "one tensor, or two"),
    "column ids": ({"mask_ids": (torch.arange(6), torch.arange(5))}, r"of the columns has shape"),
    "negatives": ({"negatives": torch.ones(4, 3)}, r"pass \[K, 7\] or \[6, K, 7\]"),
    "soft pair": ({"soft_targets": torch.ones(6, 2)}, "must be \\(columns, weights\\)"),
    "soft columns": (
        {"soft_targets": (torch.full((6, 1), 9), torch.ones(6, 1))}, "contains 9, but"
    ),
    "soft margin": (
        {"soft_targets": (torch.zeros(6, 1).long(), torch.ones(6, 1)), "margin": 0.1},
        "a margin needs positives",
    ),
    "soft weights": (
        {"soft_targets": (torch.zeros(6, 1).long(), torch.full((6, 1), -0.5))},
        r"contain -0.5; pass numbers of at least 0",
    ),
    "smoothing": ({"label_smoothing": 1.5}, "label_smoothing=1.5; pass a number from 0 to 1"),
    "z": ({"z_loss": -1.0}, "z_loss=-1.0; pass a number of at least 0"),
    "directions": ({"directions": "x"}, "both, rows, columns"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_arguments_give_one_clear_error(name):
    arguments, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        clip_loss(*unit_pairs(6, 7, seed=0), 1.0, **arguments)


@pytest.mark.parametrize("cone", (1.0, 3.0, 100.0))
@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_features_that_share_a_direction(backend, cone):
    """Derivatives cancel what features have in common; what rounding loses of them would not."""
    x, y = in_a_cone(300, 64, cone, torch.bfloat16)
    several = torch.arange(300) // 2
    for options in (
        {},
        {"directions": "rows"},
        {"directions": "columns", "positive_ids": several},
        {"label_smoothing": 0.1, "margin": 0.1},
    ):
        want = run(partial(clip_loss, **options, backend="reference"), x.double(), y.double(), 14.0)
        plain = run(partial(clip_loss, **options, backend="reference"), x, y, 14.0)
        got = run(partial(clip_loss, **options, backend=backend), x, y, 14.0)
        for name in ("x", "y"):
            ours, formula = errors(got, want)[name], errors(plain, want)[name]
            assert ours <= 1.5 * formula + 4e-7, (options, name, ours, formula)


@pytest.mark.parametrize("backend", ALL)
def test_soft_targets_that_name_a_masked_column_twice(backend):
    x = torch.eye(2)
    for columns, weights in (([[0, 0, 0]], [[0.3, 0.2, 0.4]]), ([[0]], [[0.9]])):
        rows, cols = clip_loss(
            x[:1], x[:1], 10.0, soft_targets=(torch.tensor(columns), torch.tensor(weights)),
            mask_ids=torch.tensor([0]), reduction="none", backend=backend,
        )  # fmt: skip
        assert rows.item() == cols.item() == 0


@pytest.mark.parametrize("smoothing", (0.0, 0.1), ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_a_row_whose_only_column_is_masked_has_no_gradient(backend, smoothing):
    x, y = torch.randn(2, 5, requires_grad=True), torch.randn(1, 5)
    scale = torch.tensor(1.0, requires_grad=True)
    ids = (torch.tensor([0, 1]), torch.tensor([0]))
    masks = (torch.tensor([1, 0]), torch.tensor([0]))
    clip_loss(
        x, y, scale, positive_ids=ids, mask_ids=masks, label_smoothing=smoothing, backend=backend
    ).backward()
    # Smoothing adds all columns alike, and takes the masked ones back.
    assert x.grad[1].norm() <= 1e-6 * smoothing
    assert x.grad.isfinite().all() and scale.grad.isfinite()


@pytest.mark.parametrize("backend", ALL)
def test_columns_without_any_row_have_no_gradient(backend):
    x, y = torch.randn(0, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    clip_loss(x, y, scale, label_smoothing=0.1, reduction="sum", backend=backend).backward()
    assert y.grad.eq(0).all() and scale.grad == 0


@pytest.mark.parametrize("backend", ALL)
def test_a_soft_target_that_is_not_a_number_goes_into_the_loss(backend):
    x, y = unit_pairs(3, 4, seed=0)
    weights = torch.tensor([[0.5, torch.nan], [1.0, 0.0], [torch.nan, -1.0]])
    targets = torch.tensor([[0, 1], [2, 0], [-100, -100]]), weights
    rows, cols = clip_loss(x, y, 5.0, soft_targets=targets, reduction="none", backend=backend)
    assert rows.isnan().tolist() == [True, False, False] and rows[2] == 0
    assert cols.isnan().tolist() == [False, True, False]
