"""similarity_stats in Triton, by way of clip_loss: float64 oracle, hard logits, memory poisoned.

On the CPU under the interpreter (see test_triton_interpreter.py), on a GPU where there is one.
"""

import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from clip_oracle import Results, errors, float32_logits_loss, in_a_cone, run, truth, unit_pairs
from crossed import crossed, slow
from feature_oracle import cases, feature_loss
from test_clip_features import features, widened
from test_clip_loss import HARD, rows_with_logits

from m3bind.ops import clip_loss, similarity_lse
from m3bind_kernels import launch, merge, stats_side, waves

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEATURES = list(cases(2, 2, 1, 0))
LOGITS = HARD | {
    # The case of that name, for smaller tiles than a panel of rows.
    "first panel far below the second": torch.cat(
        [torch.full((70, 100), -3000.0), torch.zeros(30, 100)]
    ),
}
# (N, D, scale, noise of y). The interpreter's tiles are 64 x 64, in pieces of 32 columns.
SHAPES = (
    (1, 7, 100.0, 1.0),  # no negatives at all
    (2, 1, 14.3, 1.0),  # one feature
    (3, 512, 100.0, 3.0),  # less than a piece; separated; many steps over the features
    (65, 33, 14.3, 2.0),  # one row and one column beyond a tile
    (101, 70, 100.0, 3.0),  # nothing is a multiple of anything
)
# Beside 1.5 x plain PyTorch's own error, worst of 5 seeds.
TOLERANCE = {"loss": 4e-7, "x": 6e-7, "y": 6e-7, "scale": 4e-6}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def moved(value):
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    return tuple(moved(v) for v in value) if isinstance(value, tuple) else value


def run_triton(x, y, scale, **arguments) -> Results:
    arguments = {name: moved(value) for name, value in arguments.items()}
    step = partial(clip_loss, **arguments, backend="triton")
    scale = torch.as_tensor(scale, dtype=torch.float32, device=DEVICE)
    return {name: t.cpu() for name, t in run(step, x.to(DEVICE), y.to(DEVICE), scale).items()}


def check_rule(samples, tolerance=TOLERANCE) -> None:
    """samples: (ours, plain PyTorch's, truth) of every seed."""
    for name, small in tolerance.items():
        ours = max(errors(got, want)[name] for got, _, want in samples)
        plain = max(errors(got, want)[name] for _, got, want in samples)
        assert ours <= 1.5 * plain + small, (name, ours, plain)


def feature_samples(feature, dtype, n, m, d, scale, seeds):
    for seed in range(seeds):
        x, y = features(n, m, d, seed, dtype)
        arguments = cases(n, m, d, seed)[feature]
        exact = widened(arguments, dtype)
        want = run(partial(feature_loss, **exact), x.double(), y.double(), scale)
        ours = run_triton(x, y, scale, **arguments)
        if want["loss"].isnan():  # no row, or no column, has a positive
            assert ours["loss"].isnan()
            continue
        plain = run(partial(clip_loss, **arguments, backend="reference"), x, y, scale)
        yield ours, plain, want


def check_feature(feature, dtype):
    scale = 30.0
    tolerance = TOLERANCE
    if "soft targets" in feature:
        # The target's logit is a dot product of its own: it cancels but for its rounding.
        rounding = {"loss": 2**-22 * scale, "x": 2**-23 * scale, "y": 2**-23 * scale}
        tolerance = TOLERANCE | rounding
    check_rule(list(feature_samples(feature, dtype, 35, 67, 33, scale, 5)), tolerance)


@pytest.mark.parametrize(("number", "feature"), list(enumerate(FEATURES)), ids=FEATURES)
def test_feature_against_float64(number, feature):
    check_feature(feature, DTYPES[number % 3])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "feature"), list(enumerate(FEATURES)), ids=FEATURES)
def test_feature_in_the_other_dtypes(number, feature):
    for further in (1, 2):
        check_feature(feature, DTYPES[(number + further) % 3])


def shape_samples(n, d, scale, noise, dtype):
    for seed in range(5):
        x, y = unit_pairs(n, d, seed=seed, noise=noise, dtype=dtype)
        plain = run(float32_logits_loss, x, y, scale)
        yield run_triton(x, y, scale), plain, truth(x, y, scale)


@pytest.mark.parametrize(("shape", "dtype"), crossed(SHAPES, DTYPES), ids=str)
def test_shape_against_float64(shape, dtype):
    check_rule(list(shape_samples(*shape, dtype)))


@pytest.fixture
def many_waves(monkeypatch):
    """As for very large matrices of many features: rounded derivatives, several bands of rows,
    several waves."""
    monkeypatch.setattr(stats_side, "MOST_FEATURES", 0)
    monkeypatch.setattr(waves, "PRECISE_PAIRS", 0)
    monkeypatch.setattr(waves, "WAVE_BYTES", 0)
    monkeypatch.setattr(waves, "WAVE_ROWS", 64)
    monkeypatch.setattr(merge, "PART_BYTES", 64 * 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_waves_against_float64(many_waves, dtype):
    check_rule(list(shape_samples(140, 40, 30.0, 2.0, dtype)))


HALF_SIDES = [(d, dtype) for d in (16, 33, 130) for dtype in DTYPES[1:]]


# Every second case holds each number of features, and both dtypes.
@pytest.mark.parametrize(
    ("d", "dtype"),
    [c if i in (0, 3, 4) else slow(*c) for i, c in enumerate(HALF_SIDES)],
    ids=str,
)
def test_sides_with_rounded_derivatives(monkeypatch, d, dtype):
    """Few features, as for very large matrices."""
    monkeypatch.setattr(waves, "PRECISE_PAIRS", 0)
    check_rule(list(shape_samples(140, d, 30.0, 2.0, dtype)))


@pytest.mark.parametrize(
    ("cone", "dtype", "way"),
    [(10.0, DTYPES[1], "sides"), (100.0, DTYPES[1], "waves"), (100.0, DTYPES[2], "sides"),
     (10.0, DTYPES[2], "waves")],
    ids=str,
)  # fmt: skip
def test_rounded_derivatives_of_features_that_share_a_direction(
    many_waves, monkeypatch, cone, dtype, way
):
    """Derivatives cancel what features have in common; what rounding loses of them would not."""
    monkeypatch.setattr(stats_side, "MOST_FEATURES", 64 if way == "sides" else 0)
    x, y = in_a_cone(130, 64, cone, dtype)
    several = (torch.arange(130) // 2,) * 2
    for options in (
        {"label_smoothing": 0.1, "margin": 0.1},
        {"directions": "columns", "positive_ids": several},
    ):
        reference = partial(clip_loss, **options, backend="reference")
        want = run(reference, x.double(), y.double(), 14.0)
        plain, got = run(reference, x, y, 14.0), run_triton(x, y, 14.0, **options)
        for name in ("x", "y"):
            ours, formula = errors(got, want)[name], errors(plain, want)[name]
            assert ours <= 1.5 * formula + TOLERANCE[name], (options, name, ours, formula)


@pytest.mark.parametrize("feature", ("mask_ids", "margin", "smoothing", "labels"))
def test_waves_with_features(many_waves, feature):
    samples = list(feature_samples(feature, torch.bfloat16, 70, 130, 33, 30.0, 2))
    check_rule(samples)


@pytest.mark.parametrize("name", LOGITS)
def test_hard_logits(name):
    x, y = rows_with_logits(LOGITS[name])
    want = truth(x, y, 1.0)
    got = run_triton(x, y, 1.0)
    for key, value in want.items():
        assert torch.isfinite(got[key]).all(), key
        # Absolute: what the logits' own rounding in float32 makes of values of this size.
        size = max(1.0, value.abs().max().item(), LOGITS[name].abs().max().item())
        assert (got[key].double() - value).abs().max() <= 1e-6 * size, key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trivially_separable_keeps_loss_and_gradient(many_waves, dtype):
    x, y = unit_pairs(48, 123, seed=0, noise=0.1, dtype=dtype)
    want = truth(x, y, 100.0)
    got = run_triton(x, y, 100.0)
    assert 0 < want["loss"] < 1e-20
    assert got["loss"] > 0
    # float16 gradients of this size are 0, whoever computes them.
    names = ("loss", "scale") if dtype == torch.float16 else ("loss", "x", "y", "scale")
    found = errors(got, want)
    assert max(found[name] for name in names) < (2e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_small_upstream_gradients_do_not_vanish(many_waves, dtype):
    """1/N, upstream gradient and scale stay out of the rounded derivatives."""
    x, y = unit_pairs(70, 24, seed=0, noise=2.0, dtype=dtype)
    # Gradients of float16 features are float16 themselves: not much smaller than this.
    small = 2.0**-22 if dtype == torch.bfloat16 else 2.0**-12
    results = []
    for factor in (1.0, small):
        leaves = [t.to(DEVICE, copy=True).requires_grad_() for t in (x, y)]
        (clip_loss(*leaves, 16.0, backend="triton") * factor).backward()
        results.append(torch.cat([t.grad.double().flatten() for t in leaves]) / factor)
    assert (results[0] - results[1]).norm() <= (results[0].norm() * 0.05 if small > 1e-6 else 0)


def test_nan_in_gives_nan_out():
    for spoil in ("x", "y", "scale"):
        x, y = unit_pairs(40, 7, seed=0)
        scale = torch.tensor(10.0)
        {"x": x, "y": y, "scale": scale}[spoil].view(-1)[0] = torch.nan
        for name, value in run_triton(x, y, scale).items():
            assert value.isnan().any(), (spoil, name)
    x, y = unit_pairs(40, 7, seed=0)
    x[3] = torch.nan
    rows, cols = clip_loss(x.to(DEVICE), y.to(DEVICE), 10.0, reduction="none", backend="triton")
    assert rows.isnan().sum() == 1 and rows[3].isnan() and cols.isnan().all()
    x[3] = torch.inf
    assert not run_triton(x, y, 10.0)["loss"].isfinite()


def test_empty_and_fully_excluded():
    empty = torch.empty(0, 5, device=DEVICE, requires_grad=True)
    assert clip_loss(empty, empty.detach(), 1.0, backend="triton").isnan()
    clip_loss(empty, empty.detach(), 1.0, reduction="sum", backend="triton").backward()
    assert empty.grad.shape == (0, 5)
    x, y = (t.to(DEVICE).requires_grad_() for t in unit_pairs(40, 6, seed=0))
    ids = torch.zeros(40, dtype=torch.int64, device=DEVICE)
    rows, cols = similarity_lse(x, y, 3.0, row_ids=ids, col_ids=ids, backend="triton")
    assert (rows == -torch.inf).all() and (cols == -torch.inf).all()
    torch.autograd.backward((rows, cols), (torch.ones_like(rows), torch.ones_like(cols)))
    assert (x.grad == 0).all() and (y.grad == 0).all()


@pytest.mark.parametrize("scale", (0.0, -15.0))
@pytest.mark.parametrize("feature", ("positive_ids and mask_ids", "margin", "smoothing"))
def test_scales_that_are_not_positive(feature, scale):
    ((got, _, want),) = feature_samples(feature, torch.float32, 41, 67, 33, scale, 1)
    for name, value in want.items():
        assert (got[name].double() - value).norm() <= 1e-5 * value.norm() + 1e-6, name


def test_a_negative_margin_raises_the_positives():
    x, y = unit_pairs(40, 6, seed=0)
    want = run(partial(feature_loss, margin=-3.0), x.double(), y.double(), 60.0)
    got = run_triton(x, y, 60.0, margin=-3.0)
    assert (got["loss"] - want["loss"]).abs() <= 1e-6
    ids = (torch.arange(40) // 4,) * 2
    want = run(partial(feature_loss, margin=-3.0, positive_ids=ids), x.double(), y.double(), 60.0)
    got = run_triton(x, y, 60.0, margin=-3.0, positive_ids=ids)
    assert max(errors(got, want).values()) < 2e-5


def test_bit_equal_from_run_to_run():
    x, y = unit_pairs(150, 40, seed=0, dtype=torch.bfloat16)
    first, second = (run_triton(x, y, 30.0) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_descriptors_and_pointers_agree(many_waves, monkeypatch):
    x, y = unit_pairs(150, 40, seed=0, dtype=torch.bfloat16)
    monkeypatch.setattr(launch, "can_describe", lambda device: True)
    described = run_triton(x, y, 30.0)
    monkeypatch.setattr(launch, "can_describe", lambda device: False)
    for name, value in run_triton(x, y, 30.0).items():
        assert torch.equal(value, described[name]), name


def test_opcheck_strides_and_wanted_gradients():
    x, y = (t.to(DEVICE) for t in unit_pairs(20, 9, seed=0))
    ids = torch.arange(20, dtype=torch.int32, device=DEVICE) * 4 + 3
    scale = torch.tensor(9.0, device=DEVICE)
    arguments = (ids, ids, None, None, 0.0, False)
    forward = torch.ops.m3bind.similarity_stats_fwd.default
    leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
    torch.library.opcheck(forward, (*leaves, *arguments, 0, "triton"))
    rows, cols, kept = forward(x, y, scale, *arguments, 0, "triton")
    backward = torch.ops.m3bind.similarity_stats_bwd.default
    for wanted in ((True, False), (False, True)):
        torch.library.opcheck(
            backward,
            (x, y, scale, *arguments, rows[0], cols[0], kept, rows, cols, *wanted, "triton"),
        )
    strided = clip_loss(x.T.contiguous().T, y[:, :], scale, backend="triton")
    assert torch.equal(strided, clip_loss(x, y, scale, backend="triton"))
