"""Powers kept from the forward to the backward pass of similarity_stats in Triton.

On the CPU under the interpreter (see test_triton_interpreter.py), on a GPU where there is one.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from clip_oracle import errors, float32_logits_loss, in_a_cone, run, truth, unit_pairs
from feature_oracle import cases, feature_loss
from test_clip_features import features, widened
from test_clip_loss import rows_with_logits
from test_memory_budget import kept_of
from test_triton_stats import (
    DEVICE,
    DTYPES,
    LOGITS,
    TOLERANCE,
    check_rule,
    many_waves,
    moved,
    poisoned_memory,
    run_triton,
)

from m3bind import backends
from m3bind.ops import clip_loss, stats
from m3bind_kernels import configs, kept, stats_bwd, stats_fwd, waves
from m3bind_kernels.launch import Inputs

__all__ = ["many_waves", "poisoned_memory"]  # fixtures
ALL = 1000.0  # MiB
FEATURES = 72


def tile_of(dtype: torch.dtype) -> configs.Config:
    found = configs.for_device("stats_fwd", dtype != torch.float32, torch.device(DEVICE))
    return configs.fitting(found, FEATURES)[0]


LARGER = tile_of(torch.float16).block_n // 64  # tiles are kept where they are whole
N = 230 * LARGER
# The scale's gradient sees every power's rounding to 11 digits, where few pairs do not average it.
ROUNDED = TOLERANCE | {"scale": 2**-12}


@pytest.fixture(autouse=True)
def worth_it(many_waves, monkeypatch):
    """As for very large matrices of many features: they are kept at all."""
    monkeypatch.setattr(stats, "FEW_FEATURES", 0)
    monkeypatch.setattr(stats, "FEW_PAIRS", 0)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return TOLERANCE if dtype == torch.float32 else ROUNDED


def of_loss(x, y, scale, **options) -> kept.Kept:
    """What the forward pass keeps of a loss."""
    x, y = (t.to(DEVICE).requires_grad_() for t in (x, y))
    memory = kept_of(clip_loss(x, y, scale, backend="triton", memory_budget=ALL, **options))
    found = kept.Kept.of(inputs_of(x, y), memory)
    assert found is not None
    return found


def inputs_of(x, y) -> Inputs:
    return Inputs.of(x, y, torch.ones((), device=x.device), None, None, None, None, 0.0, False)


def tiles_kept(found: kept.Kept) -> torch.Tensor:
    return found.shifts.isfinite().cpu()


def tiles_to_keep(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Blocks of 64 x 64 in whole tiles that do not meet the diagonal."""
    tile = tile_of(dtype)
    first = torch.arange(0, n, 64)
    row, col = first // tile.block_m * tile.block_m, first // tile.block_n * tile.block_n
    row, col = row[:, None], col[None, :]
    whole = (row + tile.block_m <= n) & (col + tile.block_n <= n)
    return whole & ((row >= col + tile.block_n) | (col >= row + tile.block_m))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", (30.0, -30.0))
def test_against_float64(dtype, scale):
    samples = []
    for seed in range(2):
        x, y = unit_pairs(N, FEATURES, seed=seed, noise=2.0, dtype=dtype)
        plain = run(float32_logits_loss, x, y, scale)
        ours = run_triton(x, y, scale, memory_budget=ALL)
        samples.append((ours, plain, truth(x, y, scale)))
    check_rule(samples, tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_powers_and_shifts(dtype):
    x, y = unit_pairs(N, FEATURES, seed=0, noise=2.0, dtype=dtype)
    found = of_loss(x, y, 30.0)
    assert tiles_kept(found).any()
    assert torch.equal(tiles_kept(found), tiles_to_keep(N, dtype))
    half = dtype != torch.float32
    assert found.powers.dtype == (torch.float16 if half else torch.float32)
    logits = 30.0 / math.log(2) * x.double() @ y.double().T
    for row, col in tiles_kept(found).nonzero().tolist():
        at = slice(64 * row, 64 * row + 64), slice(64 * col, 64 * col + 64)
        shift = found.shifts[row, col].double().cpu()
        want = torch.exp2(logits[at] - shift)
        assert want.max() < (2**15 if half else 1)
        got = found.powers[at].double().cpu()
        torch.testing.assert_close(got, want, rtol=2**-11 + 2e-5 if half else 2e-5, atol=2**-24)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_what_is_kept_is_used(dtype):
    x, y = (t.to(DEVICE).requires_grad_() for t in unit_pairs(N, FEATURES, seed=0, dtype=dtype))
    loss = clip_loss(x, y, 20.0, backend="triton", memory_budget=ALL)
    first, second = (torch.autograd.grad(loss, (x, y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    found = kept.Kept.of(inputs_of(x, y), kept_of(loss).data)
    found.powers.fill_(torch.nan)
    for spoiled in torch.autograd.grad(loss, (x, y)):
        # Only the last tiles are without anything that was kept.
        first = 128 * LARGER  # in whole tiles, of which some are beside the diagonal
        assert spoiled[:first].isnan().any(1).all()
        assert not spoiled[-8:].isnan().any()


@pytest.mark.parametrize("rows", (0, 64, 128, 192))
def test_budget(rows):
    """Whole blocks of rows, powers and shifts within the budget; the others are formed again."""
    x, y = unit_pairs(N, FEATURES, seed=0, noise=2.0, dtype=torch.bfloat16)
    blocks = -(-N // 64)  # of columns; powers of 2 bytes, and sums of 64 rows or columns
    mib = 4 * blocks * (rows * (32 + 1) + rows // 64 * (64 + 1)) / 2**20 + 1e-6
    leaf = x.to(DEVICE).requires_grad_()
    memory = kept_of(clip_loss(leaf, y.to(DEVICE), 30.0, backend="triton", memory_budget=mib))
    assert memory.nbytes <= mib * 2**20
    found = kept.Kept.of(inputs_of(leaf, y.to(DEVICE)), memory)
    assert (0 if found is None else found.powers.shape[0]) == rows
    plain, want = run(float32_logits_loss, x, y, 30.0), truth(x, y, 30.0)
    check_rule([(run_triton(x, y, 30.0, memory_budget=mib), plain, want)], ROUNDED)


def test_the_default_keeps_nothing():
    x, y = (t.to(DEVICE).requires_grad_() for t in unit_pairs(N, FEATURES, seed=0))
    assert kept_of(clip_loss(x, y, 30.0, backend="triton")).numel() == 0


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
    check_rule([(ours, plain, want)], ROUNDED | {"loss": 1e-6})


def test_neighbouring_ids_keep_most_tiles():
    """Of sorted ids only the tiles along the diagonal hold positives or masked pairs."""
    ids = torch.arange(320 * LARGER) // 4
    x, y = unit_pairs(len(ids), FEATURES, seed=0, dtype=torch.bfloat16)
    options = {"positive_ids": (ids, ids), "mask_ids": (ids // 2,) * 2}
    found = of_loss(x, y, 20.0, **{name: moved(value) for name, value in options.items()})
    assert torch.equal(tiles_kept(found), tiles_to_keep(len(ids), torch.bfloat16))
    exact = partial(feature_loss, **options)
    want = run(exact, x.double(), y.double(), 20.0)
    plain = run(partial(clip_loss, **options, backend="reference"), x, y, 20.0)
    check_rule([(run_triton(x, y, 20.0, memory_budget=ALL, **options), plain, want)], ROUNDED)


@pytest.mark.parametrize("name", [name for name in LOGITS if len(LOGITS[name]) > 64])
def test_hard_logits(name):
    x, y = rows_with_logits(LOGITS[name])
    want, got = truth(x, y, 1.0), run_triton(x, y, 1.0, memory_budget=ALL)
    for key, value in want.items():
        size = max(1.0, value.abs().max().item(), LOGITS[name].abs().max().item())
        assert (got[key].double() - value).abs().max() <= 1e-6 * size, key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_below_their_tile_are_formed_again(dtype):
    """Their powers would be lost: what float16 holds ends 2^-40 below a tile's largest."""
    x, y = unit_pairs(200 * LARGER, FEATURES, seed=0, noise=2.0, dtype=dtype)
    scale = 15.0
    x[::7] *= 6
    y[3::11] *= 4  # logits up to 15 * 24
    found = of_loss(x, y, scale)
    assert tiles_kept(found).any()
    without, within = (run_triton(x, y, scale, memory_budget=mib) for mib in (0, ALL))
    check_rule([(within, without, truth(x, y, scale))], tolerance(dtype))


@pytest.mark.parametrize("transposed", (False, True), ids=("rows", "columns"))
@pytest.mark.parametrize("levels", (6.0, 14.0, 20.0, 60.0))
def test_levels(levels, transposed):
    """Rows or columns whose softmaxes lie ever farther apart, and with them a tile's largest power
    from what they need: kept or formed again, none loses its gradient."""
    n = 192 * LARGER
    draw = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(n, n, generator=draw)
    logits += torch.linspace(0, -levels, n)[torch.randperm(n, generator=draw)][:, None]
    x, y = (t.half() for t in rows_with_logits(logits))
    (x, y), name = ((y, x), "y") if transposed else ((x, y), "x")
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


@pytest.mark.parametrize("scale", (0.0, 0.5, -0.5))
def test_small_scales_keep_nothing(scale):
    """The scale's gradient is made of logarithms of powers, which then say little of a logit."""
    x, y = unit_pairs(150, FEATURES, seed=0, noise=2.0)
    assert not tiles_kept(of_loss(x, y, scale)).any()
    without, within = (run_triton(x, y, scale, memory_budget=mib) for mib in (0, ALL))
    for name, value in without.items():
        torch.testing.assert_close(within[name], value, rtol=1e-5, atol=1e-7)


def test_nan_comes_out():
    for row in (0, 149):
        x, y = unit_pairs(150 * LARGER, FEATURES, seed=0, dtype=torch.bfloat16)
        x[row] = torch.nan
        got = run_triton(x, y, 20.0, memory_budget=ALL)
        assert all(value.isnan().any() for value in got.values())
        assert got["y"].isnan().all() and got["x"][row].isnan().all()


@pytest.mark.parametrize("shape", ((64, 256), (128, 128), (128, 256)), ids=str)
def test_tiles(monkeypatch, shape):
    """Rows that are whole blocks of 64 but not whole tiles, and fewer kept than there are."""
    config = replace(configs._INTERPRETER, block_m=shape[0], block_n=shape[1])
    monkeypatch.setattr(kept, "kept_config", lambda _: config)
    monkeypatch.setattr(waves, "WAVE_ROWS", 256)
    x, y = unit_pairs(320, FEATURES, seed=0, noise=2.0, dtype=torch.bfloat16)
    y = torch.cat([y, unit_pairs(270, FEATURES, seed=1, dtype=torch.bfloat16)[0]])
    ids = torch.arange(320), torch.arange(590)
    reference = partial(clip_loss, positive_ids=ids, backend="reference")
    want, plain = run(reference, x.double(), y.double(), 30.0), run(reference, x, y, 30.0)
    # 192 rows, and all of them.
    for mib in (4 * 10 * (192 * 33 + 3 * 65) / 2**20 + 1e-6, ALL):
        got = run_triton(x, y, 30.0, memory_budget=mib, positive_ids=ids)
        check_rule([(got, plain, want)], ROUNDED)


def test_the_tile_is_not_the_tuner_s(monkeypatch):
    """Both passes have to know it, whatever was measured between them."""
    for module in (stats_fwd, stats_bwd):
        monkeypatch.setattr(module, "choose", None)
    x, y = unit_pairs(150, FEATURES, seed=0, dtype=torch.bfloat16)
    run_triton(x, y, 30.0, memory_budget=ALL)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_saved_tensors_may_come_back_in_another_layout(dtype):
    x, y = unit_pairs(150, FEATURES, seed=0, noise=2.0, dtype=dtype)
    want = run_triton(x, y, 20.0, memory_budget=ALL)

    def spread(t):
        if t.dim() != 1:
            return t
        wider = t.new_empty(len(t), 2)
        wider[:, 0] = t
        return wider[:, 0]

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, spread):
        got = run_triton(x, y, 20.0, memory_budget=ALL)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_where_nothing_is_saved_nothing_is_used(monkeypatch):
    """Few features, few pairs, or sums of all logits."""
    x, y = unit_pairs(150, FEATURES, seed=0, noise=2.0, dtype=torch.bfloat16)
    smoothed = {"label_smoothing": 0.1}
    sides, pairs = kept.by_sides.__globals__, waves.__dict__
    assert (stats.FEW_FEATURES, stats.FEW_PAIRS) == (0, 0)
    for patch, options in (
        ((sides, "MOST_FEATURES", FEATURES), {}),
        ((pairs, "PRECISE_PAIRS", 150 * 150), {}),
        (None, smoothed),
    ):
        with monkeypatch.context() as patched:
            if patch is not None:
                patched.setitem(*patch)
            without, within = (
                run_triton(x, y, 20.0, memory_budget=mib, **options) for mib in (0, ALL)
            )
        assert all(torch.equal(within[name], value) for name, value in without.items())


def test_opcheck_and_shape():
    x, y = (t.to(DEVICE).requires_grad_() for t in unit_pairs(150, FEATURES, seed=0))
    ids = torch.arange(150, dtype=torch.int32, device=DEVICE) * 4 + 3
    scale = torch.tensor(9.0, device=DEVICE, requires_grad=True)
    forward = torch.ops.m3bind.similarity_stats_fwd.default
    for rows in (64, 150):
        arguments = (x, y, scale, ids, ids, None, None, 0.0, False, rows, "triton")
        # Of what is not kept the memory is as it was, and equals nothing.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(forward, arguments, test_utils=checks)
        memory = forward(*arguments)[2]
        assert memory.shape == stats.kept_shape(x, rows, 150, "triton")
    assert backends.keeps_powers("similarity_stats", "cuda")


def test_compiled():
    torch._dynamo.reset()
    x, y = (t.to(DEVICE) for t in unit_pairs(150, FEATURES, seed=0))
    loss = partial(clip_loss, memory_budget=0.06, backend="triton")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    eager, found = (run(call, x, y, 20.0) for call in (loss, compiled))
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value)


def test_no_memory_is_taken_where_nothing_is_saved(monkeypatch):
    """What the operator knows of the kernels' rules is true."""
    monkeypatch.undo()
    from m3bind_kernels import stats_side

    assert stats.FEW_FEATURES == stats_side.MOST_FEATURES and stats.BLOCK == kept.BLOCK
    assert stats.FEW_PAIRS == waves.PRECISE_PAIRS

    def rows(n, d, dtype=torch.bfloat16, totals=False):
        return stats.rows_to_keep(torch.empty(n, d, dtype=dtype), n, math.inf, totals, "triton")

    assert rows(1024, 257) == rows(2048, 256) == rows(2048, 512, totals=True) == 0
    assert rows(2048, 257) == 2048 and rows(1000, 257, torch.float32) == 1000
