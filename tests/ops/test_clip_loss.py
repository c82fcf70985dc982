"""clip_loss: values and gradients against float64, and logits that break naive formulas."""

import pytest
import torch
import torch.nn.functional as F
from clip_oracle import errors, float32_logits_loss, needs_native, run, truth, unit_pairs
from properties import given, settings, st

from m3bind.ops import clip_loss

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, D, scale, noise of y). Panels are 512 to 1024 rows, blocks 64, vectors 4, 8 or 16 wide.
CASES = (
    (1, 7, 100.0, 1.0),  # no negatives at all: loss and gradients are 0
    (2, 1, 14.3, 1.0),  # one feature
    (3, 512, 100.0, 3.0),  # less than one vector; separated
    (48, 7, 14.3, 1.0),  # less than one block
    (123, 123, 100.0, 3.0),  # nothing is a multiple of anything
    (252, 123, 1.0, 2.0),  # a tail of 12 rows and columns, low scale
    (507, 512, 14.3, 2.0),  # just below a panel
    (1100, 33, 100.0, 2.0),  # more than one panel, the last one ragged
)
# Beside 1.5 x plain PyTorch's own error, worst of 5 seeds. The scale's gradient is one number, a
# sum that cancels, so its rounding is not averaged.
TOLERANCE = {"loss": 4e-7, "x": 4e-7, "y": 4e-7, "scale": 2e-6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d", "scale", "noise"), CASES)
@pytest.mark.parametrize("backend", FAST)
def test_error_against_float64(backend, n, d, scale, noise, dtype):
    worst: dict[str, list[float]] = {name: [0.0, 0.0] for name in TOLERANCE}
    for seed in range(5):
        x, y = unit_pairs(n, d, seed=seed, noise=noise, dtype=dtype)
        want = truth(x, y, scale)
        ours = run(lambda *a: clip_loss(*a, backend=backend), x, y, scale)
        plain = run(float32_logits_loss, x, y, scale)
        for name, pair in worst.items():
            pair[0] = max(pair[0], errors(ours, want)[name])
            pair[1] = max(pair[1], errors(plain, want)[name])
    for name, (mine, plain_torch) in worst.items():
        assert mine <= 1.5 * plain_torch + TOLERANCE[name], (name, mine, plain_torch)


@given(
    n=st.integers(1, 90),
    d=st.integers(1, 40),
    scale=st.floats(-20, 100),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("backend", FAST)
def test_any_shape_and_scale(backend, n, d, scale, seed):
    x, y = unit_pairs(n, d, seed=seed)
    want = truth(x, y, scale)
    got = run(lambda *a: clip_loss(*a, backend=backend), x, y, scale)
    # float32 dot products err by 1e-7, which the scale multiplies.
    assert abs(got["loss"] - want["loss"]) <= 1e-6 + 1e-6 * abs(scale) + 1e-6 * want["loss"]
    for name in ("x", "y"):
        bound = (2e-6 + 4e-7 * abs(scale)) * abs(scale) + 1e-7
        assert (got[name] - want[name]).norm() <= bound, name


def rows_with_logits(logits):
    """x, y in float32 and scale 1 whose dot products are `logits` [N, N]."""
    return logits.float(), torch.eye(logits.shape[0])


def far_apart_rows():
    logits = torch.zeros(8, 8)
    logits[2], logits[3] = 100.0, -100.0  # inf * 0 with one exponential and one shift
    return logits


HARD = {
    "all equal": torch.zeros(65, 65),
    "all -120": torch.full((65, 65), -120.0),
    "all +120": torch.full((65, 65), 120.0),
    "one row at +100 beside one at -100": far_apart_rows(),
    "one column at +100 beside one at -100": far_apart_rows().T.contiguous(),
    "separated by 60": 60.0 * torch.eye(20) - 30.0,
    "negatives at -1000": torch.full((9, 9), -1000.0).fill_diagonal_(0.0),
    "one huge row": torch.cat([torch.full((1, 8), 1e4), unit_pairs(7, 8, seed=0)[0]]),
    "first panel far below the second": torch.cat(
        [torch.full((1024, 1100), -3000.0), torch.zeros(76, 1100)]
    ),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("backend", FAST)
def test_hard_logits(backend, name):
    x, y = rows_with_logits(HARD[name])
    want = truth(x, y, 1.0)
    got = run(lambda *a: clip_loss(*a, backend=backend), x, y, 1.0)
    for key, value in want.items():
        assert torch.isfinite(got[key]).all(), key
        # Absolute: what the logits' own rounding in float32 makes of values of this size.
        size = max(1.0, value.abs().max().item(), HARD[name].abs().max().item())
        assert (got[key].double() - value).abs().max() <= 1e-6 * size, key


@pytest.mark.parametrize("backend", FAST)
def test_trivially_separable_keeps_loss_and_gradient(backend):
    # cross_entropy gives a loss of 0 here and gradients that are off by a factor.
    x, y = unit_pairs(48, 123, seed=0, noise=0.1)
    want = truth(x, y, 100.0)
    got = run(lambda *a: clip_loss(*a, backend=backend), x, y, 100.0)
    assert 0 < want["loss"] < 1e-20
    assert got["loss"] > 0
    assert max(errors(got, want).values()) < 2e-5


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_nan_in_gives_nan_out(backend):
    for spoil in ("x", "y", "scale"):
        x, y = unit_pairs(20, 7, seed=0)
        scale = torch.tensor(10.0)
        {"x": x, "y": y, "scale": scale}[spoil].view(-1)[0] = torch.nan
        got = run(lambda *a: clip_loss(*a, backend=backend), x, y, scale)
        for name, value in got.items():
            assert value.isnan().any(), (spoil, name)
    x, y = unit_pairs(20, 7, seed=0)
    assert clip_loss(x, y, 10.0, logit_bias=float("nan"), backend=backend).isnan()


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_infinite_features_are_never_silently_finite(backend):
    x, y = unit_pairs(20, 7, seed=0)
    x[3, 2] = torch.inf
    assert not clip_loss(x, y, 10.0, backend=backend).isfinite()


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_empty_batch_is_as_in_torch(backend):
    x = torch.empty(0, 5, requires_grad=True)
    y = torch.empty(0, 5)
    assert clip_loss(x, y, 1.0, backend=backend).isnan()
    total = clip_loss(x, y, 1.0, reduction="sum", backend=backend)
    assert total == 0
    total.backward()
    assert x.grad.shape == (0, 5)


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_reductions_and_bias(backend):
    x, y = unit_pairs(30, 7, seed=1)
    logits = 5.0 * x @ y.T
    labels = torch.arange(30)
    rows, cols = clip_loss(x, y, 5.0, reduction="none", backend=backend)
    torch.testing.assert_close(rows, F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(cols, F.cross_entropy(logits.T, labels, reduction="none"))
    total = clip_loss(x, y, 5.0, reduction="sum", backend=backend)
    torch.testing.assert_close(total, (rows.sum() + cols.sum()) / 2)
    bias = torch.tensor([-10.0], requires_grad=True)
    mean = clip_loss(x, y, 5.0, logit_bias=bias, backend=backend)
    torch.testing.assert_close(mean, (rows.mean() + cols.mean()) / 2)
    mean.backward()
    assert bias.grad.shape == (1,)
    assert bias.grad.abs() < 8 * torch.finfo(torch.float32).eps * 30


@pytest.mark.parametrize("backend", FAST)
def test_upstream_gradients_of_rows_and_columns(backend):
    x, y = unit_pairs(70, 9, seed=2)
    weights = torch.randn(2, 70, generator=torch.Generator().manual_seed(0))

    def weighted(x, y, scale, backend):
        rows, cols = clip_loss(x, y, scale, reduction="none", backend=backend)
        return (rows * weights[0]).sum() + (cols * weights[1]).sum()

    want = run(lambda *a: weighted(*a, "reference"), x.double(), y.double(), 20.0)
    got = run(lambda *a: weighted(*a, backend), x, y, 20.0)
    assert max(errors(got, want).values()) < 2e-5
