"""siglip_loss: values and gradients against float64, and logits that break naive formulas."""

import inspect

import pytest
import torch
from clip_oracle import errors, needs_native, unit_pairs
from properties import given, settings, st
from siglip_oracle import float32_logits_loss, run, sizes, truth

from m3bind import reference
from m3bind.ops import siglip_loss

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
ALL = ("reference", *FAST)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, further columns, D, scale, bias, noise of y). Panels are 512 to 1024 rows, blocks 64, vectors
# 4, 8 or 16 wide, runs of 8 vectors.
CASES = (
    (1, 0, 7, 100.0, -10.0, 1.0),  # one pair
    (2, 0, 1, 14.3, 0.0, 1.0),  # one feature
    (3, 2, 512, 100.0, -50.0, 3.0),  # less than one vector; separated
    (48, 0, 7, 10.0, -10.0, 1.0),  # less than one block; SigLIP's initial values
    (123, 30, 123, 100.0, -10.0, 3.0),  # nothing is a multiple of anything
    (252, 255, 123, 1.0, 2.0, 2.0),  # tails everywhere, positive bias
    (507, 0, 512, 14.3, -16.0, 2.0),  # just below a panel
    (1100, 0, 33, 117.0, -12.9, 2.0),  # more than one panel, the last one ragged
)
# Beside 1.5 x plain PyTorch's own error, worst of 5 seeds, as a ratio of norms.
TOLERANCE = {"loss": 4e-7, "x": 4e-7, "y": 4e-7}
# Gradients of scale and bias are sums that cancel: judged by the sum of absolute values.
SUM_TOLERANCE = 8 * torch.finfo(torch.float32).eps


def pairs_of(n, more, d, **kwargs):
    x, y = unit_pairs(n + more, d, **kwargs)
    return x[:n], y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "more", "d", "scale", "bias", "noise"), CASES)
@pytest.mark.parametrize("backend", FAST)
def test_error_against_float64(backend, n, more, d, scale, bias, noise, dtype):
    worst: dict[str, list[float]] = {name: [0.0, 0.0] for name in TOLERANCE}
    for seed in range(5):
        x, y = pairs_of(n, more, d, seed=seed, noise=noise, dtype=dtype)
        want = truth(x, y, scale, bias)
        ours = run(lambda *a: siglip_loss(*a, backend=backend), x, y, scale, bias)
        plain = run(float32_logits_loss, x, y, scale, bias)
        for name, pair in worst.items():
            pair[0] = max(pair[0], errors(ours, want)[name])
            pair[1] = max(pair[1], errors(plain, want)[name])
        size = sizes(x, y, scale, bias)
        for name in ("scale", "bias"):
            off, theirs = (abs(r[name] - want[name]).item() for r in (ours, plain))
            assert off <= 1.5 * theirs + SUM_TOLERANCE * size[name], name
    for name, (mine, plain_torch) in worst.items():
        assert mine <= 1.5 * plain_torch + TOLERANCE[name], (name, mine, plain_torch)


@given(
    n=st.integers(1, 90),
    more=st.integers(0, 40),
    d=st.integers(1, 40),
    scale=st.floats(-20, 100),
    bias=st.floats(-100, 30),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("backend", FAST)
def test_any_shape_scale_and_bias(backend, n, more, d, scale, bias, seed):
    x, y = pairs_of(n, more, d, seed=seed)
    want = truth(x, y, scale, bias)
    got = run(lambda *a: siglip_loss(*a, backend=backend), x, y, scale, bias)
    # float32 dot products err by 1e-7, which the scale multiplies; logits are rounded to theirs.
    logit_error = 3e-7 * (1 + abs(scale) + abs(bias))
    size = sizes(x, y, scale, bias)
    smallest = 1e-37  # below it float32 is not as exact
    bound = logit_error * size["bias"] + 1e-6 * want["loss"] + smallest
    assert abs(got["loss"] - want["loss"]) <= bound
    for name in ("x", "y"):
        bound = abs(scale) * (logit_error + 1e-6) * size["bias"] + smallest
        assert (got[name] - want[name]).norm() <= bound, name
    for name in ("scale", "bias"):
        assert abs(got[name] - want[name]) <= (logit_error + 1e-6) * size["bias"] + smallest, name


def ids(seed, n, m, kinds):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-3, kinds, (size,), generator=generator) for size in (n, m))


N, M = 70, 131
PAIRS = {
    "diagonal": {},
    "labels": {"labels": torch.arange(N) * 3 % M},
    "labels, some ignored, some shared": {
        "labels": torch.where(torch.arange(N) % 3 == 0, -100, torch.arange(N) % 11)
    },
    "all ignored": {"labels": torch.full((N,), -100)},
    "several positives": {"positive_ids": ids(0, N, M, 9)},
    "mostly none": {"positive_ids": ids(1, N, M, 4000)},
    "all positive": {"positive_ids": (torch.ones(N).long(), torch.ones(M).long())},
    "masked": {"mask_ids": ids(2, N, M, 5)},
    "masked diagonal stays": {"mask_ids": (torch.arange(N), torch.arange(M))},
    "everything else masked": {"mask_ids": (torch.zeros(N).long(), torch.zeros(M).long())},
    "masks and several positives": {
        "positive_ids": ids(3, N, M, 9),
        "mask_ids": ids(4, N, M, 4),
    },
    "labels and masks": {
        "labels": torch.where(torch.arange(N) % 2 == 0, -100, torch.arange(N)),
        "mask_ids": ids(5, N, M, 3),
    },
}


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("backend", ALL)
def test_pairs_and_reductions(backend, name, reduction):
    x, y = pairs_of(N, M - N, 19, seed=1, noise=2.0)
    kwargs = {"reduction": reduction, **PAIRS[name]}
    weights = torch.randn(N, generator=torch.Generator().manual_seed(0))
    upstream = weights if reduction == "none" else torch.tensor(0.7)
    want = truth(x, y, 12.0, -3.0, upstream, **kwargs)
    got = run(lambda *a: siglip_loss(*a, backend=backend, **kwargs), x, y, 12.0, -3.0, upstream)
    assert got["loss"].shape == ((N,) if reduction == "none" else ())
    assert max(errors(got, want).values()) < 5e-6, errors(got, want)
    with torch.no_grad():
        alone = siglip_loss(x, y, 12.0, -3.0, backend=backend, **kwargs)
    torch.testing.assert_close(alone, got["loss"], rtol=1e-6, atol=0)


def test_one_tensor_of_ids_stands_for_rows_and_columns():
    x, y = unit_pairs(20, 7, seed=0)
    same = torch.arange(20) // 3
    for name in ("positive_ids", "mask_ids"):
        both = siglip_loss(x, y, 5.0, **{name: (same, same)})
        assert siglip_loss(x, y, 5.0, **{name: same}) == both


def far_apart_rows():
    logits = torch.zeros(8, 8)
    logits[2], logits[3] = 100.0, -100.0
    return logits


HARD = {
    "all equal": torch.zeros(65, 65),
    "all -10, as at the start": torch.full((700, 700), -10.0),
    "all -120": torch.full((65, 65), -120.0),
    "all +120": torch.full((65, 65), 120.0),
    "all +1e4": torch.full((65, 65), 1e4),
    "all -1e4": torch.full((65, 65), -1e4),
    "one row at +100 beside one at -100": far_apart_rows(),
    "one column at +100 beside one at -100": far_apart_rows().T.contiguous(),
    "negatives at -1000": torch.full((9, 9), -1000.0).fill_diagonal_(0.0),
    "one huge row": torch.cat([torch.full((1, 8), 1e4), unit_pairs(7, 8, seed=0)[0]]),
    "around 0": torch.linspace(-1e-3, 1e-3, 64 * 64).view(64, 64),
    "from -95 to 95": torch.linspace(-95, 95, 64 * 64).view(64, 64),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("backend", FAST)
def test_hard_logits(backend, name):
    logits = HARD[name].float()
    x, y = logits, torch.eye(logits.shape[0])
    want = truth(x, y, 1.0, 0.0)
    got, plain = (
        run(lambda *a, which=which: siglip_loss(*a, backend=which), x, y, 1.0, 0.0)
        for which in (backend, "reference")
    )
    for key, size in sizes(x, y, 1.0, 0.0).items():
        assert torch.isfinite(got[key]).all(), key
        error, formula = ((found[key].double() - want[key]).abs().max() for found in (got, plain))
        # Of 700 equal terms the products of some processors round away more than 1e-6.
        assert error <= max(1e-6 * size.max(), formula) + 1e-37, key


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("backend", ALL)
def test_trivially_separable_keeps_loss_and_gradient(backend, reduction):
    # log(1 + exp(s)) gives a loss of 0 here, and 1 - sigmoid gradients of 0.
    for n in (5, 40):
        x = torch.eye(n)
        want = truth(x, x, 100.0, -50.0, torch.ones(n) if reduction == "none" else None,
                     reduction=reduction)  # fmt: skip
        got = run(
            lambda *a: siglip_loss(*a, backend=backend, reduction=reduction), x, x, 100.0, -50.0,
            torch.ones(n) if reduction == "none" else None,
        )  # fmt: skip
        assert 0 < want["loss"].max() < 1e-19
        assert (got["loss"] > 0).all()
        assert max(errors(got, want).values()) < 1e-6


@pytest.mark.parametrize("backend", ALL)
def test_nan_in_gives_nan_out(backend):
    for spoil in ("x", "y", "scale", "bias"):
        for reduction in ("mean", "none"):
            x, y = unit_pairs(20, 7, seed=0)
            scale, bias = torch.tensor(10.0), torch.tensor(-3.0)
            {"x": x, "y": y, "scale": scale, "bias": bias}[spoil].view(-1)[0] = torch.nan
            upstream = torch.ones(20) if reduction == "none" else None
            got = run(
                lambda *a, r=reduction: siglip_loss(*a, reduction=r, backend=backend),
                x, y, scale, bias, upstream,
            )  # fmt: skip
            for name, value in got.items():
                assert value.isnan().any(), (spoil, reduction, name)


@pytest.mark.parametrize("backend", ALL)
def test_infinite_features_are_never_silently_finite(backend):
    x, y = unit_pairs(20, 7, seed=0)
    x[3, 2] = torch.inf
    assert not siglip_loss(x, y, 10.0, backend=backend).isfinite()


@pytest.mark.parametrize("backend", ALL)
def test_empty_batch_is_as_in_torch(backend):
    x = torch.empty(0, 5, requires_grad=True)
    y = torch.randn(3, 5, requires_grad=True)
    for columns in (y, y[:0]):
        scalars = torch.tensor(1.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
        mean = siglip_loss(x, columns, *scalars, backend=backend)
        assert mean.isnan()
        mean.backward()
        assert all(scalar.grad == 0 for scalar in scalars)
        assert x.grad.shape == (0, 5) and (y.grad == 0).all()
        assert siglip_loss(x, columns, 1.0, reduction="none", backend=backend).shape == (0,)
        total = siglip_loss(x, columns, 1.0, reduction="sum", backend=backend)
        assert total == 0
        total.backward()
        assert x.grad.shape == (0, 5) and (y.grad == 0).all()
    none = torch.zeros(0, dtype=torch.int64)
    mean = siglip_loss(y, x, 1.0, positive_ids=(torch.zeros(3).long(), none), backend=backend)
    assert mean == 0
    y.grad = None
    mean.backward()
    assert (y.grad == 0).all()


@pytest.mark.parametrize("backend", FAST)
def test_a_grad_scaler_reaches_the_gradients_of_half_features(backend):
    # With unit upstream they are below the smallest float16, and only what is scaled is rounded.
    x, y = (t.half() for t in unit_pairs(300, 16, seed=0))

    def scaled(*a):
        return siglip_loss(*a, backend=backend) * 65536.0

    want = truth(x, y, 1.0, -14.0, torch.tensor(65536.0))
    got = run(scaled, x, y, 1.0, -14.0)
    raw = run(lambda *a: siglip_loss(*a, backend=backend, labels=torch.full((300,), -100)),
              x, y, 1.0, -14.0)  # fmt: skip
    assert (raw["x"] == 0).float().mean() > 0.5
    for name in ("x", "y"):
        assert errors(got, want)[name] < 1e-3, name


def test_scale_and_bias_of_one_element_and_numbers():
    x, y = unit_pairs(12, 5, seed=0)
    scale, bias = torch.tensor([3.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    loss = siglip_loss(x, y, scale, bias)
    loss.backward()
    assert scale.grad.shape == bias.grad.shape == (1,)
    assert loss == siglip_loss(x, y, 3.0, -2.0)
    assert siglip_loss(x, y, 3.0) == siglip_loss(x, y, 3, 0)


def test_the_reference_has_the_same_signature():
    ours = list(inspect.signature(siglip_loss).parameters.values())
    theirs = list(inspect.signature(reference.siglip_loss).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[:-1]] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
