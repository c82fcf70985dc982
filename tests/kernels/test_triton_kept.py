"""Gradients of powers kept from the forward to the backward pass of similarity_stats in Triton.

On the CPU under the interpreter (see test_triton_interpreter.py), on a GPU where there is one.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from clip_oracle import errors, float32_logits_loss, in_a_cone, run, truth, unit_pairs
from crossed import slow
from feature_oracle import cases, feature_loss
from kept_cases import ALL, FEATURES, LARGER, N, of_loss, tiles_kept, tiles_to_keep, worth_it
from test_clip_features import features, widened
from test_clip_loss import rows_with_logits
from test_triton_stats import (
    DTYPES,
    LOGITS,
    TOLERANCE,
    check_rule,
    many_waves,
    moved,
    poisoned_memory,
    run_triton,
)

from m3bind.ops import clip_loss
from m3bind_kernels import configs, kept, waves

__all__ = ["many_waves", "poisoned_memory", "worth_it"]  # fixtures


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [*((30.0, dtype) for dtype in DTYPES), (-30.0, DTYPES[1]),
     slow(-30.0, DTYPES[0]), slow(-30.0, DTYPES[2])],
    ids=str,
)  # fmt: skip
def test_against_float64(scale, dtype):
    samples = []
    for seed in range(2):
        x, y = unit_pairs(N, FEATURES, seed=seed, noise=2.0, dtype=dtype)
        plain = run(float32_logits_loss, x, y, scale)
        ours = run_triton(x, y, scale, memory_budget=ALL)
        samples.append((ours, plain, truth(x, y, scale)))
    check_rule(samples)


# What the others add to the loss is outside of the kernels.
ARGUMENTS = ("labels", "positive_ids", "mask_ids", "positive_ids and mask_ids", "margin",
            "smoothing", "columns")  # fmt: skip


@pytest.mark.parametrize("feature", ARGUMENTS)
def test_features(feature):
    """Positives, masked pairs and what needs all logits, beside tiles that are kept."""
    sizes = 100 * LARGER, 130 * LARGER, 40, 0
    x, y = features(*sizes, torch.bfloat16)
    arguments = cases(*sizes)[feature]
    exact = partial(feature_loss, **widened(arguments, torch.bfloat16))
    want = run(exact, x.double(), y.double(), 20.0)
    if want["loss"].isnan():
        return
    plain = run(partial(clip_loss, **arguments, backend="reference"), x, y, 20.0)
    ours = run_triton(x, y, 20.0, memory_budget=ALL, **arguments)
    check_rule([(ours, plain, want)], TOLERANCE | {"loss": 1e-6})


def test_neighbouring_ids_keep_most_tiles():
    """Of sorted ids only the tiles along the diagonal hold positives or masked pairs."""
    ids = torch.arange(256 * LARGER) // 4
    x, y = unit_pairs(len(ids), FEATURES, seed=0, dtype=torch.bfloat16)
    options = {"positive_ids": (ids, ids), "mask_ids": (ids // 2,) * 2}
    found = of_loss(x, y, 20.0, **{name: moved(value) for name, value in options.items()})
    assert torch.equal(tiles_kept(found), tiles_to_keep(len(ids), torch.bfloat16))
    exact = partial(feature_loss, **options)
    want = run(exact, x.double(), y.double(), 20.0)
    plain = run(partial(clip_loss, **options, backend="reference"), x, y, 20.0)
    check_rule([(run_triton(x, y, 20.0, memory_budget=ALL, **options), plain, want)])


@pytest.mark.parametrize("name", [name for name in LOGITS if len(LOGITS[name]) > 64])
def test_hard_logits(name):
    x, y = rows_with_logits(LOGITS[name])
    want, got = truth(x, y, 1.0), run_triton(x, y, 1.0, memory_budget=ALL)
    for key, value in want.items():
        size = max(1.0, value.abs().max().item(), LOGITS[name].abs().max().item())
        assert (got[key].double() - value).abs().max() <= 1e-6 * size, key


@pytest.mark.parametrize("dtype", (*DTYPES[:2], slow(DTYPES[2])), ids=str)
def test_rows_far_below_their_tile_are_formed_again(dtype):
    """Their powers would be lost: what float16 holds ends 2^-40 below a tile's largest."""
    x, y = unit_pairs(N, FEATURES, seed=0, noise=2.0, dtype=dtype)
    scale = 15.0
    x[::7] *= 6
    y[3::11] *= 4  # logits up to 15 * 24
    found = of_loss(x, y, scale)
    assert tiles_kept(found).any()
    without, within = (run_triton(x, y, scale, memory_budget=mib) for mib in (0, ALL))
    check_rule([(within, without, truth(x, y, scale))])


@pytest.mark.parametrize(
    ("levels", "side"),
    [(14.0, "columns"), (20.0, "rows"), (60.0, "columns"), slow(6.0, "rows"), slow(6.0, "columns"),
     slow(14.0, "rows"), slow(20.0, "columns"), slow(60.0, "rows")],
)  # fmt: skip
def test_levels(levels, side):
    """Rows or columns whose softmaxes lie ever farther apart, and with them a tile's largest power
    from what they need: kept or formed again, none loses its gradient."""
    n = 192 * LARGER
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(n, n, generator=draw)
    logits += torch.linspace(0, -levels, n)[torch.randperm(n, generator=draw)][:, None]
    x, y = (t.half() for t in rows_with_logits(logits))
    (x, y), name = ((y, x), "y") if side == "columns" else ((x, y), "x")
    want = truth(x, y, 1.0)[name]
    off = []
    for mib in (0, ALL):
        got = run_triton(x, y, 1.0, memory_budget=mib)[name].double()
        off.append(((got - want).norm(dim=1) / want.norm(dim=1)).max())
    assert off[1] <= 1.5 * off[0]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_wide_softmaxes(dtype):
    """A row spread over thousands of columns, below a tile's largest power: float16 holds none of
    its powers well, though together they are all that it has."""
    x, y = (in_a_cone(n, 64, 10.0, dtype)[0] for n in (64, 4096))
    x[::32] *= 2.6
    ids = torch.arange(64), torch.arange(4096)
    options = {"directions": "rows", "positive_ids": ids}
    reference = partial(clip_loss, **options, backend="reference")
    want = run(reference, x.double(), y.double(), 14.0)["x"]
    rows = []
    for found in (run(reference, x, y, 14.0), run_triton(x, y, 14.0, memory_budget=ALL, **options)):
        rows.append(((found["x"].double() - want).norm(dim=1) / want.norm(dim=1)).max())
    assert rows[1] <= 1.5 * rows[0]


@pytest.mark.parametrize(
    ("cone", "dtype"),
    [(100.0, torch.bfloat16), (300.0, torch.bfloat16), (10.0, torch.float16),
     (100.0, torch.float16)],
    ids=str,
)  # fmt: skip
def test_features_that_share_a_direction(cone, dtype):
    """Derivatives cancel what features have in common; what rounding takes of powers would not."""
    x, y = in_a_cone(150 * LARGER, 64, cone, dtype)
    for options in ({}, {"directions": "columns"}):
        reference = partial(clip_loss, **options, backend="reference")
        want = run(reference, x.double(), y.double(), 14.0)
        plain = run(reference, x, y, 14.0)
        got = run_triton(x, y, 14.0, memory_budget=ALL, **options)
        for name in ("x", "y"):
            ours, formula = errors(got, want)[name], errors(plain, want)[name]
            assert ours <= 1.5 * formula + TOLERANCE[name], (options, name, ours, formula)
        # The scale's gradient is next to nothing of sums of what is as large as a dot product.
        ours, formula = ((found["scale"] - want["scale"]).abs() for found in (got, plain))
        assert ours <= 1.5 * formula + 2**-23, (options, ours, formula)


@pytest.mark.parametrize(
    ("scale", "size", "dtype"),
    [(0.0, 1.0, DTYPES[1]), (30.0, 2**-10, DTYPES[0]), (-0.5, 1.0, DTYPES[1]),
     slow(-0.5, 1.0, DTYPES[0]), slow(30.0, 2**-10, DTYPES[1])],
    ids=str,
)  # fmt: skip
def test_small_logits(scale, size, dtype):
    """Their distances from a shift, an integer, would say little of them."""
    x, y = unit_pairs(N, FEATURES, seed=0, noise=2.0, dtype=dtype)
    x, y = x * size, y * size
    assert tiles_kept(of_loss(x, y, scale)).any()
    without, within = (run_triton(x, y, scale, memory_budget=mib) for mib in (0, ALL))
    check_rule([(within, without, truth(x, y, scale))])


def test_nan_comes_out():
    for row in (0, 149):
        x, y = unit_pairs(150 * LARGER, FEATURES, seed=0, dtype=torch.bfloat16)
        x[row] = torch.nan
        got = run_triton(x, y, 20.0, memory_budget=ALL)
        assert all(value.isnan().any() for value in got.values())
        assert got["y"].isnan().all() and got["x"][row].isnan().all()


@pytest.mark.parametrize(("block_m", "block_n"), [(128, 128), slow(64, 256), slow(128, 256)])
def test_tiles(monkeypatch, block_m, block_n):
    """Rows that are whole blocks of 64 but not whole tiles (of 128), fewer kept than there are."""
    config = replace(configs._INTERPRETER, block_m=block_m, block_n=block_n)
    monkeypatch.setattr(kept, "kept_config", lambda _: config)
    monkeypatch.setattr(waves, "WAVE_ROWS", 256)
    x, y = unit_pairs(320, FEATURES, seed=0, noise=2.0, dtype=torch.bfloat16)
    y = torch.cat([y, unit_pairs(270, FEATURES, seed=1, dtype=torch.bfloat16)[0]])
    ids = torch.arange(320), torch.arange(590)
    reference = partial(clip_loss, positive_ids=ids, backend="reference")
    want, plain = run(reference, x.double(), y.double(), 30.0), run(reference, x, y, 30.0)
    # 192 rows, and all of them.
    for mib in (4 * 10 * (192 * 34 + 3 * 129) / 2**20 + 1e-6, ALL):
        got = run_triton(x, y, 30.0, memory_budget=mib, positive_ids=ids)
        check_rule([(got, plain, want)])
