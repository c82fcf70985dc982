"""clip_loss with directions="rows" or "columns": the plain case, which forms its gradient early."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from clip_oracle import errors, needs_native, run, unit_pairs

from m3bind.ops import clip_loss

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, M, D, scale, noise): no negatives; separated; columns beyond the rows; more than one panel
CASES = (
    (1, 1, 7, 100.0, 1.0),
    (48, 48, 123, 100.0, 0.1),
    (252, 507, 123, 14.3, 2.0),
    (252, 252, 512, -20.0, 2.0),
    (1100, 1100, 33, 100.0, 2.0),
)
TOLERANCE = {"loss": 4e-7, "x": 4e-7, "y": 4e-7, "scale": 2e-6}


def oracle(x, y, scale, direction, margin=0.0):
    """Without cancellation, like the oracle of both directions."""
    logits = scale * (x @ y.T - margin * torch.eye(len(x), len(y), dtype=x.dtype))
    if direction == "columns":
        logits = logits[:, : len(x)].T
    negatives = logits.masked_fill(torch.eye(*logits.shape, dtype=torch.bool), -torch.inf)
    return torch.logaddexp(torch.zeros(()), negatives.logsumexp(1) - logits.diagonal()).mean()


def plain(x, y, scale, direction):
    logits = scale * x.float() @ y.float().T
    logits = logits if direction == "rows" else logits[:, : len(x)].T
    return F.cross_entropy(logits, torch.arange(len(x)))


def features(n, m, d, noise, seed, dtype=torch.float32):
    x, y = unit_pairs(n, d, seed=seed, noise=noise)
    return x.to(dtype), torch.cat([y, unit_pairs(m - n, d, seed=seed + 50)[1]]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d", "scale", "noise"), CASES)
@pytest.mark.parametrize("direction", ("rows", "columns"))
@pytest.mark.parametrize("backend", FAST)
def test_error_against_float64(backend, direction, n, m, d, scale, noise, dtype):
    worst = {name: [0.0, 0.0] for name in TOLERANCE}
    for seed in range(5):
        x, y = features(n, m, d, noise, seed, dtype)
        rounded = torch.tensor(scale).item()
        want = run(partial(oracle, direction=direction), x.double(), y.double(), rounded)
        ours = run(partial(clip_loss, directions=direction, backend=backend), x, y, scale)
        theirs = run(partial(plain, direction=direction), x, y, scale)
        for name, pair in worst.items():
            pair[0] = max(pair[0], errors(ours, want)[name])
            pair[1] = max(pair[1], errors(theirs, want)[name])
    for name, (mine, plain_torch) in worst.items():
        assert mine <= 1.5 * plain_torch + TOLERANCE[name], (name, mine, plain_torch)


@pytest.mark.parametrize("direction", ("rows", "columns"))
@pytest.mark.parametrize("backend", FAST)
def test_logits_far_apart_margin_and_sum(backend, direction):
    x, y = features(40, 60, 9, 1.0, 0)
    x[3] *= 300  # one shift for all rows would lose the others
    both = partial(oracle, direction=direction, margin=0.3)
    want = run(lambda *a: 40 * both(*a), x.double(), y.double(), 20.0)
    got = run(
        partial(clip_loss, directions=direction, margin=0.3, reduction="sum", backend=backend),
        x, y, 20.0,
    )  # fmt: skip
    for name, error in errors(got, want).items():
        assert error < 3e-6, name


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("direction", ("rows", "columns"))
@pytest.mark.parametrize("backend", FAST)
def test_without_rows_the_gradients_are_zero_as_in_torch(backend, direction, reduction):
    results = []
    for name in (backend, "reference"):
        leaves = torch.empty(0, 8), torch.ones(3, 8), torch.tensor(10.0)
        leaves = [t.requires_grad_() for t in leaves]
        loss = clip_loss(*leaves, directions=direction, reduction=reduction, backend=name)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert results[1][2].abs().sum() == 0
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("direction", ("rows", "columns"))
@pytest.mark.parametrize("backend", FAST)
def test_nan_in_a_column_without_a_positive(backend, direction):
    x, y = features(4, 6, 8, 1.0, 0)
    y[5] = torch.nan
    found, want = (
        run(partial(clip_loss, directions=direction, backend=name), x, y, 5.0)
        for name in (backend, "reference")
    )
    assert found["x"].isnan().all() and want["x"].isnan().all()
    assert torch.equal(found["loss"].isnan(), want["loss"].isnan())


@pytest.mark.parametrize("direction", ("rows", "columns"))
@pytest.mark.parametrize("backend", FAST)
def test_nan_upstream_factors_and_wanted_gradients(backend, direction):
    loss = partial(clip_loss, directions=direction, backend=backend)
    x, y = features(20, 30, 7, 1.0, 0)
    whole = run(loss, x, y, 10.0)
    # A GradScaler's factor reaches float16 gradients before they are rounded.
    half = run(lambda *a: 65536 * loss(*a), x.half() * 1e-3, y.half() * 1e-3, 10.0)
    assert half["x"].isfinite().all() and half["x"].abs().max() > 0
    for wanted in ("x", "y", "scale"):
        leaves = {"x": x.clone(), "y": y.clone(), "scale": torch.tensor(10.0)}
        leaves[wanted].requires_grad_()
        loss(*leaves.values()).backward()
        torch.testing.assert_close(leaves[wanted].grad, whole[wanted], rtol=1e-5, atol=1e-8)
    for spoil in ("x", "y", "scale"):
        spoiled = {"x": x.clone(), "y": y.clone(), "scale": torch.tensor(10.0)}
        spoiled[spoil].view(-1)[0] = torch.nan
        for name, value in run(loss, *spoiled.values()).items():
            assert value.isnan().any(), (spoil, name)


@needs_native
def test_contract():
    torch._dynamo.reset()
    x, y = (t.requires_grad_() for t in features(13, 17, 7, 1.0, 0))
    scale = torch.tensor(3.0, requires_grad=True)
    forward = torch.ops.m3bind.info_nce_rows_fwd.default
    for need in ((True, True), (True, False), (False, True), (False, False)):
        leaves = (x.detach().requires_grad_(need[0]), y.detach().requires_grad_(need[1]), scale)
        torch.library.opcheck(forward, (*leaves, 0.1, True, *need, "cpp"))
    given = [t.detach() for t in (x, y, scale)]
    grads = forward(*given, 0.1, True, True, True, "cpp")[1:]
    backward = torch.ops.m3bind.info_nce_rows_bwd.default
    torch.library.opcheck(backward, (torch.tensor(0.5), *given, *grads))
    (grad,) = torch.autograd.grad(clip_loss(x, y, scale, directions="rows"), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fused operators have no second derivatives"):
        grad.sum().backward()
    for direction in ("rows", "columns"):
        loss = partial(clip_loss, directions=direction, backend="cpp")
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for name, value in run(compiled, *given).items():
            torch.testing.assert_close(value, run(loss, *given)[name])


@needs_native
def test_bit_equal_for_any_threads():
    x, y = features(1500, 1500, 64, 1.0, 0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(partial(clip_loss, directions="rows", backend="cpp"), x, y, 30.0))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@needs_native
@needs_native
@pytest.mark.slow  # fast sibling: test_error_against_float64, of more than one panel
@pytest.mark.parametrize("directions", ("both", "rows"))
def test_more_pairs_than_32_bits_count(directions):
    # All logits are 0, so the results are known; float32 holds sums of powers of two exactly.
    n, m = 1 << 15, 1 << 17
    x, y = torch.ones(n, 1, requires_grad=True), torch.zeros(m, 1, requires_grad=True)
    loss = clip_loss(x, y, 2.0, directions=directions, reduction="sum", backend="cpp")
    loss.backward()
    assert n * m > 2**31
    log_m, log_n = (torch.tensor(float(k)).log() for k in (m, n))
    want = n * log_m if directions == "rows" else n * (log_m + log_n) / 2
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    # Of y[j], from the rows: n / m - 1 where it is a positive, n / m where not; from the columns,
    # whose softmax is over x that are all alike: 0.
    by_rows = torch.full((m, 1), n / m)
    by_rows[:n] -= 1
    share = 1.0 if directions == "rows" else 0.5
    torch.testing.assert_close(y.grad, 2.0 * share * by_rows, rtol=1e-5, atol=1e-6)
    assert (x.grad == 0).all()


def test_no_gradient_is_formed_where_none_is_wanted():
    x, y = features(20, 30, 7, 1.0, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        clip_loss(x, y, 10.0, directions="rows", backend="cpp")
    names = {event.key for event in profile.key_averages()}
    assert "m3bind::similarity_stats_fwd" in names
    assert "m3bind::info_nce_rows_fwd" not in names
