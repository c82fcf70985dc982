"""What similarity_distill owes torch: schema, fake, autograd, compile, autocast, threads."""

import os
import subprocess
import sys

import pytest
import torch
from clip_oracle import errors, needs_native
from distill_oracle import features, run, truth

from m3bind import backends
from m3bind.ops import similarity_distill

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
ALL = ("reference", *FAST)
KINDS = ("kl", "ce")


def operator_arguments(*, grad: bool, masked: bool) -> list:
    x, y, teacher_x, teacher_y = features(13, 17, 7, 5, seed=0)
    scale = torch.tensor(3.0)
    for t in (x, y, scale):
        t.requires_grad_(grad)
    masks = (torch.arange(13).int() // 2, torch.arange(17).int()) if masked else (None, None)
    return [x, y, scale, teacher_x.half(), teacher_y.half(), torch.tensor(9.0), *masks]


@pytest.mark.parametrize("masked", (True, False))
@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend, masked):
    forward = torch.ops.m3bind.similarity_distill_fwd.default
    for kl in (True, False):
        arguments = operator_arguments(grad=True, masked=masked)
        torch.library.opcheck(forward, (*arguments, kl, backend))
    arguments = operator_arguments(grad=False, masked=masked)
    row_loss, col_loss, row_lse, col_lse = forward(*arguments, True, backend)
    backward = torch.ops.m3bind.similarity_distill_bwd.default
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        torch.library.opcheck(
            backward, (*arguments, row_lse, col_lse, row_loss, col_loss, *needs, backend)
        )


def in_float64(backend: str, kind: str = "kl", **options):
    x, y, teacher_x, teacher_y = (t.double() for t in features(6, 5, 3, 4, seed=0))
    teacher = (teacher_x, teacher_y, 9.0)
    ids = (torch.arange(6) // 2, torch.arange(5))

    def loss(x, y, scale):
        return similarity_distill(
            x, y, scale, *teacher, kind=kind, mask_ids=ids, backend=backend, **options
        )

    return loss, [t.requires_grad_() for t in (x, y, torch.tensor(3.0, dtype=torch.float64))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_gradcheck_in_float64(backend, kind):
    assert torch.autograd.gradcheck(*in_float64(backend, kind))
    assert torch.autograd.gradcheck(*in_float64(backend, kind, reduction="none"))


def test_gradgradcheck_of_the_reference_and_refusal_of_the_fused():
    assert torch.autograd.gradgradcheck(*in_float64("reference"))
    loss, leaves = in_float64("chunked")
    (grad,) = torch.autograd.grad(loss(*leaves), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward; pass backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ALL)
def test_compile_without_graph_breaks(backend):
    torch._dynamo.reset()
    given = features(20, 30, 7, 5, seed=0)
    options = {"backend": backend, "mask_ids": (torch.arange(20) // 2, torch.arange(30))}
    compiled = torch.compile(
        lambda *a: similarity_distill(*a, **options), fullgraph=True, backend="aot_eager"
    )
    eager = run(similarity_distill, given, 10.0, 14.0, **options)
    for name, value in run(compiled, given, 10.0, 14.0).items():
        torch.testing.assert_close(value, eager[name])


@needs_native
def test_compile_with_inductor_autocast_and_a_new_shape():
    torch._dynamo.reset()

    def step(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return similarity_distill(*args)

    compiled = torch.compile(step, fullgraph=True)
    for n in (20, 33):
        # Values that bfloat16 holds exactly, and gradients to its rounding: inductor leaves out the
        # rounding of a cast to and fro.
        given = tuple(t.float() for t in features(n, 30, 7, 5, seed=0, dtype=torch.bfloat16))
        eager, got = run(step, given, 14.2857, 9.0), run(compiled, given, 14.2857, 9.0)
        for name, rtol in (("loss", 1e-6), ("scale", 1e-5), ("x", 1e-2), ("y", 1e-2)):
            torch.testing.assert_close(got[name], eager[name], rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("backend", ALL)
def test_autocast_rounds_all_features_and_no_scale(backend):
    x, y, *teacher = features(40, 30, 16, 8, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = similarity_distill(x, y, 14.2857, *teacher, 14.2857, backend=backend)
    x, y, *teacher = features(40, 30, 16, 8, seed=0, dtype=torch.bfloat16)
    assert got.dtype == torch.float32
    assert got == similarity_distill(x, y, 14.2857, *teacher, 14.2857, backend=backend)


@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs_and_gradients(backend):
    given = features(24, 30, 10, 6, seed=0)
    plain = run(similarity_distill, given, 10.0, 14.0, backend=backend)
    strided = []
    for t in given:
        wide = torch.zeros(t.shape[1], 2 * t.shape[0])
        wide[:, ::2] = t.T
        strided.append(wide[:, ::2].T)
    assert not any(t.is_contiguous() for t in strided)

    def loss(x, y, s, *rest):
        # clone() in run() makes leaves contiguous: the views are taken within.
        x, y = (t.T.contiguous().T for t in (x, y))
        return similarity_distill(x, y, s, *rest, backend=backend)

    for name, value in run(loss, tuple(strided), 10.0, 14.0).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-7)
    x = given[0].requires_grad_()
    rows, _ = similarity_distill(
        x, given[1], 10.0, *given[2:], 14.0, reduction="none", backend=backend
    )
    grads = [
        torch.autograd.grad(rows, x, g, retain_graph=True)[0]
        for g in (torch.ones(1).expand(24), torch.ones(24), torch.ones(24, 2)[:, 0])
    ]
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("backend", FAST)
def test_only_the_wanted_gradients(backend):
    given = features(24, 30, 10, 6, seed=0)
    everything = run(similarity_distill, given, 10.0, 14.0, backend=backend)
    for wanted in ("x", "y", "scale"):
        leaves = {"x": given[0].clone(), "y": given[1].clone(), "scale": torch.tensor(10.0)}
        leaves[wanted].requires_grad_()
        similarity_distill(*leaves.values(), *given[2:], 14.0, backend=backend).backward()
        torch.testing.assert_close(leaves[wanted].grad, everything[wanted], rtol=1e-5, atol=1e-8)


@needs_native
@pytest.mark.parametrize("scale", (30.0, 3000.0), ids=("", "own shifts"))
@pytest.mark.parametrize("n", (100, 1500), ids=("one block and a bit", "two panels"))
def test_bit_equal_from_run_to_run_and_for_any_threads(n, scale):
    given = features(n, 300, 64, 32, seed=0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(similarity_distill, given, scale, 20.0, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


CAPABILITY_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from clip_oracle import errors
from distill_oracle import features, run, truth
from m3bind import _C
from m3bind.ops import similarity_distill
for kind in ("kl", "ce"):
    for scale, teacher_scale in ((20.0, 9.0), (-3.0, 100.0), (0.0, 14.0), (3000.0, 30.0)):
        given = features(141, 77, 37, 11, seed=0)
        got = run(similarity_distill, given, scale, teacher_scale, kind=kind, backend="cpp")
        want = truth(given, scale, teacher_scale, kind=kind)
        for name, error in errors(got, want).items():
            assert error < 1e-6 * max(10.0, abs(scale)), (kind, scale, name, error)
    x, y, _, _ = given
    for scale in (20.0, 3000.0):
        for value in run(similarity_distill, (x, y, x, y), scale, scale, backend="cpp").values():
            assert not value.any(), scale
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


@needs_native
@pytest.mark.slow
def test_more_than_two_to_the_31_pairs():
    # Every feature vector is there many times: the softmax divides by that, the divergence stays.
    small = features(8, 8, 3, 4, seed=0)
    n, m = 46400, 46352
    assert n * m > 2**31
    large = tuple(t.repeat(k // 8, 1) for t, k in zip(small, (n, m, n, m), strict=True))
    want, got = truth(small, 5.0, 9.0), run(similarity_distill, large, 5.0, 9.0, backend="cpp")
    got["x"], got["y"] = got["x"][-8:] * (n // 8), got["y"][-8:] * (m // 8)
    found = errors(got, want)
    assert found["loss"] < 1e-6 and found["scale"] < 1e-5
    # Each is a float32 sum of 46 thousand terms, few of them different, that cancel.
    assert found["x"] < 1e-3 and found["y"] < 1e-3


@needs_native
def test_choice_of_backend():
    assert backends.resolve("similarity_distill", "cpu", torch.bfloat16) == "cpp"
    assert backends.resolve("similarity_distill", "cpu", torch.float64) == "chunked"


def call(**changed):
    x, y, teacher_x, teacher_y = features(6, 8, 7, 5, seed=0)
    given = {
        "x": x, "y": y, "logit_scale": 1.0, "teacher_x": teacher_x, "teacher_y": teacher_y,
        "teacher_scale": 1.0,
    }  # fmt: skip
    return similarity_distill(**(given | changed))


SOME = torch.randn(6, 5)
BAD_CALLS = {
    "matrix": ({"teacher_x": SOME[0]}, r"teacher_x has shape \(5,\)"),
    "rows": ({"teacher_x": SOME[:3]}, "teacher_x has 3 rows on cpu, x has 6"),
    "columns": ({"teacher_y": SOME}, "teacher_y has 6 rows on cpu, y has 8"),
    "width": ({"teacher_x": SOME[:, :3]}, "teacher_x has 3 features a row, teacher_y has 5"),
    "dtypes": (
        {"teacher_x": SOME.half()},
        "teacher_x is torch.float16, teacher_y is torch.float32",
    ),
    "device": ({"teacher_x": SOME.to("meta")}, "teacher_x is on meta, teacher_y on cpu"),
    "not a tensor": ({"teacher_y": None}, "teacher_y must be a tensor, not NoneType"),
    "scale": ({"teacher_scale": torch.ones(2)}, r"teacher_scale has shape \(2,\)"),
    "kind": ({"kind": "js"}, "kind='js': choose one of kl, ce"),
    "directions": ({"directions": "row"}, "one of both, rows, columns"),
    "reduction": ({"reduction": "avg"}, "one of mean, sum, none"),
    "ids": ({"mask_ids": torch.arange(6)}, r"mask_ids of the columns has shape \(6,\)"),
    "backend": ({"backend": "fast"}, "reference, chunked, cpp"),
    "triton": ({"backend": "triton"}, "cannot run similarity_distill: "),
    "float64": (
        {"teacher_x": SOME.double(), "teacher_y": torch.randn(8, 5).double(), "backend": "cpp"},
        "not float64",
    ),
}


@needs_native
@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_arguments_give_one_clear_error(name):
    changed, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(**changed)
