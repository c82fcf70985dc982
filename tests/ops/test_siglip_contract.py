"""What siglip_loss owes torch: schema, fake, autograd, compile, autocast, threads, messages."""

import os
import subprocess
import sys

import pytest
import torch
from clip_oracle import errors, needs_native, unit_pairs
from siglip_oracle import run, truth

from m3bind.losses import SigLipLoss
from m3bind.ops import siglip_loss

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
ALL = ("reference", *FAST)
OPS = torch.ops.m3bind


def arguments(dtype=torch.float32, *, grad=True, pairs=True):
    """x, y, scale, bias and the int32 classes and masks of the operators."""
    x, y = unit_pairs(17, 7, seed=0)
    floats = [t.to(dtype) for t in (x[:13], y, torch.tensor(3.0), torch.tensor(-1.0))]
    for t in floats:
        t.requires_grad_(grad)
    ids = torch.arange(17, dtype=torch.int32)
    others = (ids[:13] // 2, ids // 2, ids[:13] // 3, ids // 3) if pairs else (None,) * 4
    return (*floats, *others)


@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend):
    for pairs in (True, False):
        given = arguments(pairs=pairs)
        torch.library.opcheck(OPS.siglip_fwd.default, (*given, backend))
        given = arguments(pairs=pairs, grad=False)
        for need in ((True, True), (True, False), (False, True), (False, False)):
            torch.library.opcheck(OPS.siglip_bwd.default, (*given, torch.rand(13), *need, backend))
            leaves = [t.clone() for t in given[:4]]
            for leaf, wanted in zip(leaves, (*need, True, True), strict=True):
                leaf.requires_grad_(wanted)
            torch.library.opcheck(
                OPS.siglip_total_fwd.default, (*leaves, *given[4:], pairs, *need, backend)
            )
    grads = OPS.siglip_total_fwd(*given, True, True, True, backend)[1:]
    torch.library.opcheck(OPS.siglip_total_bwd.default, (torch.tensor(0.5), *given[:4], *grads))


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_gradcheck_in_float64(backend, reduction):
    x, y, scale, bias, *_ = arguments(torch.float64)
    ids = (torch.arange(13) // 2, torch.arange(17) // 2)
    for kwargs in ({}, {"positive_ids": ids}, {"mask_ids": ids}):
        assert torch.autograd.gradcheck(
            lambda *a, k=kwargs: siglip_loss(*a, reduction=reduction, backend=backend, **k),
            (x, y, scale, bias),
        )


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_gradgradcheck_of_the_reference_and_refusal_of_the_fused(reduction):
    leaves = arguments(torch.float64)[:4]
    assert torch.autograd.gradgradcheck(
        lambda *a: siglip_loss(*a, reduction=reduction, backend="reference"), leaves
    )
    loss = siglip_loss(*leaves, reduction=reduction, backend="chunked").sum()
    (grad,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward; pass backend='reference'"):
        grad.sum().backward()


def products(step):
    """Names of the operators that a step calls, and its GEMMs in units of N x M x D."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    found = profile.key_averages(group_by_input_shape=True)
    gemms = sum(e.count for e in found if e.key in ("aten::mm", "aten::addmm_"))
    return {e.key.removeprefix("m3bind::") for e in found if e.key.startswith("m3bind::")}, gemms


@pytest.mark.parametrize("backend", FAST)
def test_work(backend):
    """Three GEMMs for a scalar whose gradient is wanted, four for rows, one without gradients."""
    x, y, scale, bias, *_ = arguments()

    def loss(reduction):
        return siglip_loss(x, y, scale, bias, reduction=reduction, backend=backend)

    cases = [
        (3, {"siglip_total_fwd"}, lambda: loss("mean").backward()),
        (3, {"siglip_total_fwd"}, lambda: loss("sum").backward()),
        (4, {"siglip_fwd", "siglip_bwd"}, lambda: loss("none").sum().backward()),
        (1, {"siglip_fwd"}, lambda: torch.no_grad()(loss)("mean")),
    ]
    frozen = [t.detach() for t in (x, y, scale, bias)]
    cases.append((1, {"siglip_fwd"}, lambda: siglip_loss(*frozen, backend=backend)))
    one = [frozen[0], y, *frozen[2:]]
    cases.append(
        (
            2,
            {"siglip_total_fwd"},
            lambda: siglip_loss(*one, backend=backend).backward(),
        )
    )
    for gemms, names, step in cases:
        called, counted = products(step)
        assert called == names
        # The C++ kernels call their GEMMs below the profiler.
        assert counted == (gemms if backend == "chunked" else 0), names


MEMORY_SCRIPT = """
import resource, sys, torch
from m3bind.ops import siglip_loss
x, y = (torch.randn(14000, 4, requires_grad=True) for _ in range(2))
siglip_loss(x[:64], y[:64], 1.0, backend=sys.argv[1]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for reduction in ("mean", "none"):
    siglip_loss(x, y, 1.0, -5.0, reduction=reduction, backend=sys.argv[1]).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("backend", FAST)
def test_memory_holds_no_matrix(backend):
    # The matrix of 14000 x 14000 is 748 MiB.
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, backend], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < {"chunked": 374, "cpp": 100}[backend]


@needs_native
@pytest.mark.slow
def test_more_pairs_than_32_bits_count():
    # All logits are 0, so the results are known, and float32 holds the sums of GEMMs exactly.
    n, m = 46400, 46300
    x, y = torch.ones(n, 1, requires_grad=True), torch.ones(m, 1, requires_grad=True)
    labels = torch.full((n,), -100)
    scale = torch.tensor(0.5, requires_grad=True)
    loss = siglip_loss(x, y, scale, -0.5, labels=labels, reduction="sum", backend="cpp")
    loss.backward()
    assert n * m > 2**31
    torch.testing.assert_close(loss / (n * m), torch.tensor(2.0).log(), rtol=1e-6, atol=0)
    assert scale.grad == torch.tensor(0.5 * n * m)
    assert (x.grad == 0.25 * m).all()
    assert (y.grad == 0.25 * n).all()


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("backend", ALL)
def test_compile_without_graph_breaks(backend, reduction):
    torch._dynamo.reset()
    x, y = unit_pairs(20, 7, seed=0)
    upstream = torch.rand(20) if reduction == "none" else None

    def loss(*a):
        return siglip_loss(*a, reduction=reduction, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager = run(loss, x, y, 10.0, -3.0, upstream)
    for name, value in run(compiled, x, y, 10.0, -3.0, upstream).items():
        torch.testing.assert_close(value, eager[name])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, y, 10.0, -3.0), eager["loss"])


@needs_native
def test_compile_with_inductor_autocast_and_a_new_shape():
    torch._dynamo.reset()

    def step(x, y, s, b):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return siglip_loss(x, y, s, b, positive_ids=torch.arange(len(x)) // 2)

    compiled = torch.compile(step, fullgraph=True)
    for n in (20, 33):
        # Values that bfloat16 holds exactly, and gradients to its rounding: inductor leaves out the
        # rounding of a cast to and fro.
        x, y = (t.float() for t in unit_pairs(n, 7, seed=0, dtype=torch.bfloat16))
        eager, got = run(step, x, y, 14.2857, -5.1), run(compiled, x, y, 14.2857, -5.1)
        for name, rtol in (
            ("loss", 1e-6),
            ("scale", 1e-5),
            ("bias", 1e-5),
            ("x", 1e-2),
            ("y", 1e-2),
        ):
            torch.testing.assert_close(got[name], eager[name], rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("backend", ALL)
def test_autocast_rounds_the_features_and_not_scale_and_bias(backend):
    x, y = unit_pairs(40, 16, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = siglip_loss(x, y, 14.2857, -10.07, backend=backend)
    rounded = siglip_loss(x.bfloat16(), y.bfloat16(), 14.2857, -10.07, backend=backend)
    assert got.dtype == torch.float32
    assert got == rounded
    assert got != siglip_loss(x, y, 14.2857, -10.07, backend=backend)


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs_and_gradients(backend, reduction):
    x, y = unit_pairs(24, 10, seed=0)

    def loss(*a):
        return siglip_loss(*a, reduction=reduction, backend=backend)

    upstream = torch.linspace(0.1, 1, 48).view(24, 2)[:, 0]
    if reduction != "none":
        upstream = upstream[1]
    plain = run(loss, x, y, 10.0, -3.0, upstream.clone())
    wide = torch.zeros(10, 48)
    wide[:, ::2] = x.T
    strided = wide[:, ::2].T
    assert not strided.is_contiguous() and not y.T.contiguous().T.is_contiguous()
    got = run(loss, strided, y.T.contiguous().T, 10.0, -3.0, upstream)
    for name, value in plain.items():
        # GEMMs of other strides may round logits of 10 otherwise, which the scale of 10 multiplies.
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=3e-6)
    x.requires_grad_()
    value = loss(x, y, 10.0, -3.0)
    grads = [
        torch.autograd.grad(value, x, g, retain_graph=True)[0]
        for g in (torch.ones(()).expand_as(value), torch.ones_like(value))
    ]
    assert torch.equal(*grads)  # a second backward pass, too


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("backend", FAST)
def test_only_the_wanted_gradients(backend, reduction):
    x, y = unit_pairs(24, 10, seed=0)

    def loss(*a):
        return siglip_loss(*a, reduction=reduction, backend=backend).sum()

    everything = run(loss, x, y, 10.0, -3.0)
    for wanted in ("x", "y", "scale", "bias"):
        leaves = {"x": x, "y": y, "scale": torch.tensor(10.0), "bias": torch.tensor(-3.0)}
        leaves[wanted] = leaves[wanted].clone().requires_grad_()
        loss(*leaves.values()).backward()
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
            results.append(run(lambda *a: siglip_loss(*a, backend="cpp"), x, y, 30.0, -5.0))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


CAPABILITY_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from clip_oracle import errors, unit_pairs
from siglip_oracle import run, truth
from m3bind import _C
from m3bind.ops import siglip_loss
x, y = unit_pairs(141, 37, seed=0, noise=2.0)
for scale, bias in ((20.0, -10.0), (-3.0, 0.0), (0.0, -2.0), (100.0, -60.0), (3000.0, 5.0)):
    got = run(lambda *a: siglip_loss(*a, backend="cpp"), x, y, scale, bias)
    for name, error in errors(got, truth(x, y, scale, bias)).items():
        assert error < 1e-6 * max(5.0, abs(scale) / 10), (scale, name, error)
print(_C.cpu_capability)
"""


@needs_native
@pytest.mark.parametrize("capability", ("default", "avx2", "avx512"))
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


@pytest.mark.parametrize("backend", FAST)
def test_one_gradient_formula_for_scalars_and_rows(backend):
    x, y = unit_pairs(90, 20, seed=3)
    rows = run(
        lambda *a: siglip_loss(*a, reduction="none", backend=backend).sum() / 90, x, y, 9.0, -4.0
    )
    mean = run(lambda *a: siglip_loss(*a, backend=backend), x, y, 9.0, -4.0)
    for name in rows:
        torch.testing.assert_close(rows[name], mean[name], rtol=1e-5, atol=1e-8)
    assert max(errors(mean, truth(x, y, 9.0, -4.0)).values()) < 2e-6


IDS = torch.arange(6)
BAD_CALLS = {
    "matrix": (lambda x, y: siglip_loss(x[0], y, 1.0), r"x has shape \(7,\)"),
    "rows": (lambda x, y: siglip_loss(x, y[:3], 1.0), "x has 6 rows, y has 3"),
    "features": (lambda x, y: siglip_loss(x, y[:, :3], 1.0), "x has 7 features a row, y has 3"),
    "dtypes": (lambda x, y: siglip_loss(x, y.half(), 1.0), "torch.float32, y is torch.float16"),
    "device": (lambda x, y: siglip_loss(x, y.to("meta"), 1.0), "x is on cpu, y on meta"),
    "scale": (lambda x, y: siglip_loss(x, y, torch.ones(2)), r"logit_scale has shape \(2,\)"),
    "bias": (lambda x, y: siglip_loss(x, y, 1.0, torch.ones(2)), r"logit_bias has shape \(2,\)"),
    "bias type": (lambda x, y: siglip_loss(x, y, 1.0, "1"), "logit_bias must be a number"),
    "labels": (lambda x, y: siglip_loss(x, y, 1.0, labels=IDS + 1), "labels contains 6, but"),
    "short labels": (lambda x, y: siglip_loss(x, y, 1.0, labels=IDS[:5]), r"labels has shape \(5,"),
    "float ids": (lambda x, y: siglip_loss(x, y, 1.0, positive_ids=x[:, 0]), "be an int64 tensor"),
    "three ids": (
        lambda x, y: siglip_loss(x, y, 1.0, mask_ids=(IDS, IDS, IDS)),
        "mask_ids must be one tensor, or two",
    ),
    "both": (
        lambda x, y: siglip_loss(x, y, 1.0, labels=IDS, positive_ids=IDS),
        "labels and positive_ids exclude each other",
    ),
    "reduction": (lambda x, y: siglip_loss(x, y, 1.0, reduction="avg"), "one of mean, sum, none"),
    "backend": (lambda x, y: siglip_loss(x, y, 1.0, backend="fast"), "reference, chunked, cpp"),
    "triton": (lambda x, y: siglip_loss(x, y, 1.0, backend="triton"), "cannot run siglip_loss: "),
    "ranks": (lambda x, y: SigLipLoss(rank=1, world_size=4), "world_size=4"),
    "exchange": (lambda x, y: SigLipLoss(dist_impl="ring"), "one of bidir, shift, reduce, gather"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_arguments_give_one_clear_error(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(*unit_pairs(6, 7, seed=0))
