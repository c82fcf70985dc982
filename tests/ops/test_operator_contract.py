"""What every operator owes torch: schema, fake, autograd, compile, autocast, threads, messages."""

import os
import subprocess
import sys

import pytest
import torch
from clip_oracle import needs_native, run, unit_pairs

from m3bind import backends, use_backend
from m3bind.ops import clip_loss, similarity_lse

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
ALL = ("reference", *FAST)


def lse_arguments(dtype=torch.float32, *, grad=True):
    x, y = unit_pairs(13, 7, seed=0)
    y = torch.cat([y, x[:4]])
    ids = torch.arange(17) // 2
    x, y, scale = x.to(dtype), y.to(dtype), torch.tensor(3.0, dtype=dtype)
    for t in (x, y, scale):
        t.requires_grad_(grad)
    return x, y, scale, ids[:13].clone(), ids


@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend):
    x, y, scale, row_ids, col_ids = lse_arguments()
    ids, mask = (row_ids.int() * 4, col_ids.int() * 4), (row_ids.int() % 3, col_ids.int() % 3)
    forward = torch.ops.m3bind.similarity_stats_fwd.default
    for pairs in ((None,) * 4, (*ids, None, None), (None, None, *mask), (*ids, *mask)):
        for kept in (0, 9):
            torch.library.opcheck(forward, (x, y, scale, *pairs, 0.1, True, kept, backend))
    x, y, scale, *_ = lse_arguments(grad=False)
    inputs = (x, y, scale, *ids, *mask, 0.1, True)
    rows, cols, kept = forward(*inputs, 9, backend)
    backward = torch.ops.m3bind.similarity_stats_bwd.default
    for need_x, need_y in ((True, True), (True, False), (False, True), (False, False)):
        torch.library.opcheck(
            backward, (*inputs, rows[0], cols[0], kept, rows, cols, need_x, need_y, backend)
        )


@pytest.mark.parametrize("backend", FAST)
def test_opcheck_of_the_plain_case(backend):
    leaves = lse_arguments()[:3]
    forward = torch.ops.m3bind.info_nce_fwd.default
    for mean, kept in ((True, 0), (False, 13)):
        torch.library.opcheck(forward, (*leaves, 0.1, mean, kept, backend))
    x, y, scale, *_ = lse_arguments(grad=False)
    _, *saved = forward(x, y, scale, 0.1, True, 9, backend)
    backward = torch.ops.m3bind.info_nce_bwd.default
    for need in ((True, True), (True, False), (False, True), (False, False)):
        grad = torch.tensor(0.5)
        torch.library.opcheck(backward, (x, y, scale, 0.1, True, *saved, grad, *need, backend))


@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_gradcheck_in_float64(backend):
    x, y, scale, row_ids, col_ids = lse_arguments(torch.float64)

    def lse(x, y, scale):
        return similarity_lse(x, y, scale, row_ids=row_ids, col_ids=col_ids, backend=backend)

    assert torch.autograd.gradcheck(lse, (x, y, scale))
    assert torch.autograd.gradcheck(
        lambda x, y, s: clip_loss(x, y[:13], s, backend=backend), (x, y, scale)
    )


@pytest.mark.parametrize("backend", FAST)
def test_similarity_lse_equals_the_reference(backend):
    x, y, scale, row_ids, col_ids = lse_arguments()
    weights = torch.randn(30, generator=torch.Generator().manual_seed(0))
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, y, scale)]
        rows, cols = similarity_lse(*leaves, row_ids=row_ids, col_ids=col_ids, backend=name)
        (torch.cat([rows, cols]) * weights.to(dtype)).sum().backward()
        results.append([rows, cols, *(t.grad for t in leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", FAST)
def test_everything_left_out(backend):
    x, y, scale, _, _ = lse_arguments()
    ids = torch.zeros(17, dtype=torch.int64)
    rows, cols = similarity_lse(x, y, scale, row_ids=ids[:13], col_ids=ids, backend=backend)
    assert (rows == -torch.inf).all() and (cols == -torch.inf).all()
    torch.autograd.backward((rows, cols), (torch.ones_like(rows), torch.ones_like(cols)))
    for t in (x, y, scale):
        assert (t.grad == 0).all()


def test_gradgradcheck_of_the_reference_and_refusal_of_the_fused():
    x, y = (t.double().requires_grad_() for t in unit_pairs(5, 3, seed=0))
    assert torch.autograd.gradgradcheck(
        lambda x, y: clip_loss(x, y, 2.0, backend="reference"), (x, y)
    )
    loss = clip_loss(x, y, 2.0, backend="chunked")
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward; pass backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ALL)
def test_compile_without_graph_breaks(backend):
    torch._dynamo.reset()
    x, y = unit_pairs(20, 7, seed=0)
    compiled = torch.compile(
        lambda x, y, s: clip_loss(x, y, s, backend=backend), fullgraph=True, backend="aot_eager"
    )
    eager = run(lambda *a: clip_loss(*a, backend=backend), x, y, 10.0)
    for name, value in run(compiled, x, y, 10.0).items():
        torch.testing.assert_close(value, eager[name])


@needs_native
def test_compile_with_inductor_autocast_and_a_new_shape():
    torch._dynamo.reset()

    def step(x, y, s):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return clip_loss(x, y, s)

    compiled = torch.compile(step, fullgraph=True)
    for n in (20, 33):
        # Values that bfloat16 holds exactly, and gradients to its rounding: inductor leaves out the
        # rounding of a cast to and fro.
        x, y = (t.float() for t in unit_pairs(n, 7, seed=0, dtype=torch.bfloat16))
        eager, got = run(step, x, y, 14.2857), run(compiled, x, y, 14.2857)
        for name, rtol in (("loss", 1e-6), ("scale", 1e-5), ("x", 1e-2), ("y", 1e-2)):
            torch.testing.assert_close(got[name], eager[name], rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("backend", ALL)
def test_autocast_rounds_the_features_and_not_the_scale(backend):
    x, y = unit_pairs(40, 16, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = clip_loss(x, y, 14.2857, backend=backend)
    rounded = clip_loss(x.bfloat16(), y.bfloat16(), 14.2857, backend=backend)
    assert got.dtype == torch.float32
    assert got == rounded
    assert got != clip_loss(x, y, 14.2857, backend=backend)


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs_and_gradients(backend):
    x, y = unit_pairs(24, 10, seed=0)
    plain = run(lambda *a: clip_loss(*a, backend=backend), x, y, 10.0)
    wide = torch.zeros(10, 48)
    wide[:, ::2] = x.T
    strided = wide[:, ::2].T
    assert not strided.is_contiguous() and not y.T.contiguous().T.is_contiguous()
    got = run(
        lambda x, y, s: clip_loss(x, y, s, backend=backend), strided, y.T.contiguous().T, 10.0
    )
    for name, value in plain.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7)
    x.requires_grad_()
    rows, _ = similarity_lse(x, y, 10.0, backend=backend)
    grads = [
        torch.autograd.grad(rows, x, g, retain_graph=True)[0]
        for g in (torch.ones(1).expand(24), torch.ones(24), torch.ones(24, 2)[:, 0])
    ]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("backend", FAST)
def test_only_the_wanted_gradients(backend):
    x, y = unit_pairs(24, 10, seed=0)
    everything = run(lambda *a: clip_loss(*a, backend=backend), x, y, 10.0)
    for wanted in ("x", "y", "scale"):
        leaves = {"x": x.clone(), "y": y.clone(), "scale": torch.tensor(10.0)}
        leaves[wanted].requires_grad_()
        clip_loss(*leaves.values(), backend=backend).backward()
        torch.testing.assert_close(leaves[wanted].grad, everything[wanted], rtol=1e-5, atol=1e-8)


@needs_native
@pytest.mark.parametrize("n", (100, 1500), ids=("one block and a bit", "two panels"))
def test_bit_equal_from_run_to_run_and_for_any_threads(n):
    x, y = unit_pairs(n, 64, seed=0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(lambda *a: clip_loss(*a, backend="cpp"), x, y, 30.0))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


CAPABILITY_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from clip_oracle import errors, run, truth, unit_pairs
from m3bind import _C
from m3bind.ops import clip_loss
x, y = unit_pairs(141, 37, seed=0, noise=2.0)
for scale in (20.0, -3.0, 0.0, 3000.0):
    got = run(lambda *a: clip_loss(*a, backend="cpp"), x, y, scale)
    for name, error in errors(got, truth(x, y, scale)).items():
        assert error < 1e-6 * max(10.0, abs(scale)), (scale, name, error)
print(_C.cpu_capability)
"""


@needs_native
@pytest.mark.parametrize("capability", ("default", "avx2", "avx512", "avx512_bf16"))
def test_every_instruction_set(capability):
    done = subprocess.run(
        [sys.executable, "-c", CAPABILITY_SCRIPT, os.path.dirname(__file__)],
        env={**os.environ, "M3BIND_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if "this processor does not have it" in done.stderr:
        pytest.skip(f"no {capability} on this processor")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == capability


@needs_native
def test_environment_variables():
    code = (
        "import torch; from m3bind import backends; print(backends.native());"
        "print(backends.resolve('clip_loss', 'cpu', torch.float32))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "M3BIND_CPU_CAPABILITY": "mmx", "M3BIND_BACKEND": "reference"},
        capture_output=True,
        text=True,
    )
    reason, chosen = done.stdout.splitlines()
    assert "M3BIND_CPU_CAPABILITY=mmx: choose one of" in reason and "default" in reason
    assert chosen == "reference"


@needs_native
def test_choice_of_backend():
    assert backends.resolve("clip_loss", "cpu", torch.float32) == "cpp"
    assert backends.resolve("clip_loss", "cpu", torch.float64) == "chunked"
    assert backends.resolve("clip_loss", "cuda", torch.bfloat16) == "chunked"
    with use_backend("chunked"):
        assert backends.resolve("clip_loss", "cpu", torch.float32) == "chunked"
        assert backends.resolve("clip_loss", "cpu", torch.float32, "cpp") == "cpp"
    assert backends.resolve("clip_loss", "cpu", torch.float32) == "cpp"
    with pytest.raises(ValueError, match="unknown backend 'fast'"), use_backend("fast"):
        pass


BAD_CALLS = {
    "matrix": (lambda x, y: clip_loss(x[0], y, 1.0), r"x has shape \(7,\)"),
    "rows": (lambda x, y: clip_loss(x, y[:3], 1.0), "x has 6 rows, y has 3: row i"),
    "features": (lambda x, y: clip_loss(x, y[:, :3], 1.0), "x has 7 features a row, y has 3"),
    "no features": (lambda x, y: clip_loss(x[:, :0], y[:, :0], 1.0), "at least 1"),
    "dtypes": (lambda x, y: clip_loss(x, y.half(), 1.0), "torch.float32, y is torch.float16"),
    "integers": (lambda x, y: clip_loss(x.int(), y.int(), 1.0), "torch.int32; cast"),
    "not a tensor": (lambda x, y: clip_loss(x.tolist(), y, 1.0), "x must be a tensor, not list"),
    "device": (lambda x, y: clip_loss(x, y.to("meta"), 1.0), "x is on cpu, y on meta"),
    "scale": (lambda x, y: clip_loss(x, y, torch.ones(2)), r"logit_scale has shape \(2,\)"),
    "scale type": (lambda x, y: clip_loss(x, y, "1"), "logit_scale must be a number"),
    "reduction": (lambda x, y: clip_loss(x, y, 1.0, reduction="avg"), "one of mean, sum, none"),
    "backend": (lambda x, y: clip_loss(x, y, 1.0, backend="fast"), "reference, chunked, cpp"),
    "triton": (lambda x, y: clip_loss(x, y, 1.0, backend="triton"), "cannot run clip_loss: "),
    "float64": (lambda x, y: clip_loss(x.double(), y.double(), 1.0, backend="cpp"), "not float64"),
    "one id": (lambda x, y: similarity_lse(x, y, 1.0, row_ids=torch.arange(6)), "both row_ids"),
    "ids": (
        lambda x, y: similarity_lse(x, y, 1.0, row_ids=torch.arange(5), col_ids=torch.arange(6)),
        r"row_ids has shape \(5,\)",
    ),
}


@needs_native
@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_arguments_give_one_clear_error(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(*unit_pairs(6, 7, seed=0))
