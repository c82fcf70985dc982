"""siglip in Triton, by way of siglip_loss: float64 oracle, hard logits, memory poisoned.

On the CPU under the interpreter (see test_triton_interpreter.py), on a GPU where there is one.
"""

from functools import partial

import pytest
import torch
from clip_oracle import errors, unit_pairs
from crossed import crossed
from siglip_oracle import float32_logits_loss, run, sizes, truth
from test_siglip_loss import HARD, PAIRS, SUM_TOLERANCE, M, N, pairs_of
from test_triton_stats import DEVICE, DTYPES, moved, poisoned_memory  # noqa: F401

from m3bind.ops import siglip_loss
from m3bind_kernels import configs, launch, siglip_passes, waves

# (N, further columns, D, scale, bias, noise of y). The interpreter's tiles are 64 x 64, in pieces
# of 32 columns.
SHAPES = (
    (1, 0, 7, 100.0, -10.0, 1.0),  # one pair
    (2, 0, 1, 14.3, 0.0, 1.0),  # one feature
    (3, 2, 512, 100.0, -50.0, 3.0),  # less than a piece; separated; many steps over the features
    (65, 0, 33, 10.0, -10.0, 2.0),  # one row and one column beyond a tile; SigLIP's initial values
    (101, 30, 70, 100.0, -10.0, 3.0),  # nothing is a multiple of anything
)
ROWS_OF_TILE = configs.for_device("siglip", True, torch.device(DEVICE))[0].block_m
# Beside 1.5 x plain PyTorch's own error, worst of 5 seeds, as in test_siglip_loss.py.
TOLERANCE = {"loss": 4e-7, "x": 6e-7, "y": 6e-7}


def run_triton(x, y, scale, bias, upstream=None, **arguments):
    arguments = {name: moved(value) for name, value in arguments.items()}
    step = partial(siglip_loss, **arguments, backend="triton")
    scale, bias = (torch.as_tensor(t, dtype=torch.float32, device=DEVICE) for t in (scale, bias))
    upstream = None if upstream is None else upstream.to(DEVICE)
    found = run(step, x.to(DEVICE), y.to(DEVICE), scale, bias, upstream)
    return {name: t.cpu() for name, t in found.items()}


def check_rule(batches, scale, bias, **arguments):
    """The worst error of all batches (x, y, upstream) against plain PyTorch's."""
    worst = {name: [0.0, 0.0] for name in TOLERANCE}
    for x, y, upstream in batches:
        given = (x, y, scale, bias, upstream)
        want = truth(*given, **arguments)
        ours = run_triton(*given, **arguments)
        plain = run(partial(float32_logits_loss, **arguments), *given)
        for name, pair in worst.items():
            pair[0] = max(pair[0], errors(ours, want)[name])
            pair[1] = max(pair[1], errors(plain, want)[name])
        if upstream is None and not arguments:
            size = sizes(x, y, scale, bias)
            for name in ("scale", "bias"):
                off, theirs = (abs(r[name] - want[name]).item() for r in (ours, plain))
                assert off <= 1.5 * theirs + SUM_TOLERANCE * size[name], name
    for name, (mine, theirs) in worst.items():
        assert mine <= 1.5 * theirs + TOLERANCE[name], (name, mine, theirs)


def batches(n, more, d, noise, dtype, *, rows=False):
    for seed in range(5):
        weights = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        yield (
            *pairs_of(n, more, d, seed=seed, noise=noise, dtype=dtype),
            weights if rows else None,
        )


@pytest.mark.parametrize(("shape", "dtype"), crossed(SHAPES, DTYPES), ids=str)
def test_shape_against_float64(shape, dtype):
    n, more, d, scale, bias, noise = shape
    check_rule(batches(n, more, d, noise, dtype), scale, bias)


@pytest.fixture
def many_waves(monkeypatch):
    """As for very large matrices: rounded derivatives, several bands of rows, several waves."""
    monkeypatch.setattr(waves, "PRECISE_PAIRS", 0)
    monkeypatch.setattr(waves, "WAVE_BYTES", 0)
    monkeypatch.setattr(waves, "WAVE_ROWS", 64)
    monkeypatch.setattr(siglip_passes, "PART_BYTES", 0)


@pytest.mark.parametrize(("dtype", "reduction"), crossed(DTYPES, ("mean", "none")), ids=str)
def test_waves_against_float64(many_waves, dtype, reduction):
    rows = reduction == "none"
    given = batches(140, 20, 40, 2.0, dtype, rows=rows)
    check_rule(given, 10.0, -10.0, **({"reduction": "none"} if rows else {}))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_equal_derivatives_at_all_positives(many_waves, dtype):
    """All positives have one logit, so that rounding their derivatives errs in one direction."""
    given = (batch[0] for batch in batches(130, 0, 40, 2.0, dtype))
    check_rule(((x, x, None) for x in given), 8.0, -9.3)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_and_reductions(name, reduction):
    x, y = pairs_of(N, M - N, 19, seed=1, noise=2.0)
    arguments = {"reduction": reduction, **PAIRS[name]}
    weights = torch.randn(N, generator=torch.Generator().manual_seed(0))
    upstream = weights if reduction == "none" else torch.tensor(0.7)
    want = truth(x, y, 12.0, -3.0, upstream, **arguments)
    got = run_triton(x, y, 12.0, -3.0, upstream, **arguments)
    assert got["loss"].shape == ((N,) if reduction == "none" else ())
    assert max(errors(got, want).values()) < 5e-6, errors(got, want)
    given = {key: moved(value) for key, value in arguments.items()}
    alone = siglip_loss(x.to(DEVICE), y.to(DEVICE), 12.0, -3.0, backend="triton", **given)
    torch.testing.assert_close(alone.cpu(), got["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("number", "name"), list(enumerate(PAIRS)), ids=list(PAIRS))
def test_waves_of_pairs(many_waves, number, name):
    given = list(batches(N, M - N, 19, 2.0, DTYPES[1 + number % 2]))[:2]
    check_rule(given, 12.0, -3.0, **PAIRS[name])


@pytest.mark.parametrize("name", HARD)
def test_hard_logits(name):
    logits = HARD[name][:140, :140].float()
    x, y = logits, torch.eye(len(logits))
    want = truth(x, y, 1.0, 0.0)
    got = run_triton(x, y, 1.0, 0.0)
    for key, size in sizes(x, y, 1.0, 0.0).items():
        assert torch.isfinite(got[key]).all(), key
        assert (got[key].double() - want[key]).abs().max() <= 1e-6 * size.max() + 1e-37, key


@pytest.mark.parametrize(("dtype", "reduction"), crossed(DTYPES, ("mean", "none")), ids=str)
def test_trivially_separable_keeps_loss_and_gradient(many_waves, dtype, reduction):
    """All derivatives are far below what float16 holds."""
    x = torch.eye(140).to(dtype)
    upstream = torch.ones(140) if reduction == "none" else None
    want = truth(x, x, 100.0, -50.0, upstream, reduction=reduction)
    got = run_triton(x, x, 100.0, -50.0, upstream, reduction=reduction)
    assert 0 < want["loss"].max() < 1e-19
    assert (got["loss"] > 0).all()
    # float16 gradients of this size are 0, whoever computes them.
    names = want.keys() - ({"x", "y"} if dtype == torch.float16 else set())
    found = errors(got, want)
    for name in names:
        assert found[name] < (1e-6 if got[name].dtype == torch.float32 else 5e-3), name


def test_a_wave_of_ordinary_derivatives_after_tiny_ones(many_waves):
    """The boost of the first wave must leave the gradient of y, and not reach the second."""
    n = 140 * ROWS_OF_TILE // 64
    x = torch.eye(n)
    x[n // 2 :] *= 0.5  # logits of 0 at the positives of these rows, and of -50 elsewhere
    x = x.bfloat16()
    y = torch.eye(n).bfloat16()
    for rows in (torch.arange(n), torch.arange(n).flip(0)):
        given = (x[rows], y[rows], 100.0, -50.0)
        want, got = truth(*given), run_triton(*given)
        assert max(errors(got, want).values()) < 4e-3
        if rows[0] == 0:  # what the first wave adds, of 1e-20, is still there
            own, wanted = ({"y": found["y"].diagonal()[:ROWS_OF_TILE]} for found in (got, want))
            assert errors(own, wanted)["y"] < 4e-3


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_small_upstream_gradients_do_not_vanish(many_waves, dtype):
    """1/N, upstream gradient and scale stay out of the rounded derivatives."""
    x, y = unit_pairs(70, 24, seed=0, noise=2.0, dtype=dtype)
    # Gradients of float16 features are float16 themselves: not much smaller than this.
    small = 2.0**-22 if dtype == torch.bfloat16 else 2.0**-12
    for reduction in ("mean", "none"):
        results = []
        for factor in (1.0, small):
            leaves = [t.to(DEVICE, copy=True).requires_grad_() for t in (x, y)]
            loss = siglip_loss(*leaves, 16.0, -3.0, reduction=reduction, backend="triton")
            (loss.mean() * factor).backward()
            results.append(torch.cat([t.grad.double().flatten() for t in leaves]) / factor)
        off = (results[0] - results[1]).norm()
        assert off <= (results[0].norm() * 0.05 if small > 1e-6 else 0)


def test_a_grad_scaler_reaches_the_gradients_of_half_features(many_waves):
    x, y = unit_pairs(140, 16, seed=0, dtype=torch.float16)
    upstream = torch.tensor(65536.0)
    want = truth(x, y, 1.0, -14.0, upstream)
    got = run_triton(x, y, 1.0, -14.0, upstream)
    for name in ("x", "y"):
        assert errors(got, want)[name] < 1e-3, name


def test_nan_in_gives_nan_out(many_waves):
    for dtype in (torch.float32, torch.bfloat16):
        for spoil in ("x", "y", "scale", "bias", "upstream"):
            x, y = unit_pairs(70, 7, seed=0, dtype=dtype)
            scale, bias, upstream = torch.tensor(10.0), torch.tensor(-3.0), torch.ones(70)
            given = {"x": x, "y": y, "scale": scale, "bias": bias, "upstream": upstream}
            given[spoil].view(-1)[0] = torch.nan
            for reduction in ("mean", "none") if spoil != "upstream" else ("none",):
                above = upstream if reduction == "none" else None
                got = run_triton(x, y, scale, bias, above, reduction=reduction)
                for name, value in got.items():
                    expected = name != "loss" or spoil != "upstream"
                    assert value.isnan().any() == expected, (dtype, spoil, reduction, name)
    x, y = (t.to(DEVICE) for t in unit_pairs(70, 7, seed=0))
    x[3] = torch.nan
    rows = siglip_loss(x, y, 10.0, reduction="none", backend="triton")
    assert rows.isnan().sum() == 1 and rows[3].isnan()
    x[3] = torch.inf
    assert not siglip_loss(x, y, 10.0, backend="triton").isfinite()


def test_empty():
    x = torch.empty(0, 5, device=DEVICE, requires_grad=True)
    y = torch.ones(3, 5, device=DEVICE, requires_grad=True)
    for columns in (y, y[:0]):
        mean = siglip_loss(x, columns, 1.0, backend="triton")
        assert mean.isnan()
        mean.backward()
        assert x.grad.shape == (0, 5) and (y.grad == 0).all()
        assert siglip_loss(x, columns, 1.0, reduction="none", backend="triton").shape == (0,)
        total = siglip_loss(x, columns, 1.0, reduction="sum", backend="triton")
        assert total == 0
        total.backward()
        assert x.grad.shape == (0, 5) and (y.grad == 0).all()
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    ids = (torch.zeros(3, dtype=torch.int64, device=DEVICE), none)
    for reduction in ("mean", "none"):
        y.grad = None
        loss = siglip_loss(y, x, 1.0, positive_ids=ids, reduction=reduction, backend="triton")
        assert (loss == 0).all()
        loss.sum().backward()
        assert (y.grad == 0).all()


@pytest.mark.parametrize(("scale", "bias"), ((0.0, -2.0), (-15.0, 3.0), (3000.0, 5.0)))
def test_unusual_scales(scale, bias):
    x, y = unit_pairs(70, 19, seed=0, noise=2.0)
    got, want = run_triton(x, y, scale, bias), truth(x, y, scale, bias)
    assert max(errors(got, want).values()) < 1e-6 * max(5.0, abs(scale) / 10)


def test_bit_equal_from_run_to_run(many_waves):
    x, y = unit_pairs(150, 40, seed=0, dtype=torch.bfloat16)
    first, second = (run_triton(x, y, 30.0, -9.0) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_descriptors_and_pointers_agree(many_waves, monkeypatch):
    x, y = unit_pairs(150, 40, seed=0, dtype=torch.bfloat16)
    monkeypatch.setattr(launch, "can_describe", lambda device: True)
    described = run_triton(x, y, 30.0, -9.0)
    monkeypatch.setattr(launch, "can_describe", lambda device: False)
    for name, value in run_triton(x, y, 30.0, -9.0).items():
        assert torch.equal(value, described[name]), name


def test_opcheck_strides_and_wanted_gradients():
    x, y = (t.to(DEVICE) for t in pairs_of(13, 4, 7, seed=0))
    scale, bias = torch.tensor(3.0, device=DEVICE), torch.tensor(-1.0, device=DEVICE)
    ids = torch.arange(17, dtype=torch.int32, device=DEVICE)
    given = (ids[:13] // 2, ids // 2, ids[:13] // 3, ids // 3)
    ops, weights = torch.ops.m3bind, torch.rand(13, device=DEVICE)
    leaves = [t.clone().requires_grad_() for t in (x, y, scale, bias)]
    torch.library.opcheck(ops.siglip_fwd.default, (*leaves, *given, "triton"))
    for need in ((True, False), (False, True), (False, False)):
        plain = (x, y, scale, bias, *given)
        torch.library.opcheck(ops.siglip_bwd.default, (*plain, weights, *need, "triton"))
        leaves = [t.clone() for t in (x, y, scale, bias)]
        for leaf, wanted in zip(leaves, (*need, True, True), strict=True):
            leaf.requires_grad_(wanted)
        torch.library.opcheck(
            ops.siglip_total_fwd.default, (*leaves, *given, True, *need, "triton")
        )
    strided = siglip_loss(x.T.contiguous().T, y[:, :], scale, bias, backend="triton")
    assert torch.equal(strided, siglip_loss(x, y, scale, bias, backend="triton"))
