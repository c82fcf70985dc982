"""What similarity_distill promises beside values: masks, reductions, and all that torch is owed."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from clip_oracle import errors, needs_native
from distill_oracle import features, run, truth
from torch import Tensor

from m3bind import backends
from m3bind.ops import similarity_distill

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
ALL = ("reference", *FAST)
KINDS = ("kl", "ce")


def masked_dense(s: Tensor, t: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the rows and which rows have a pair left, by a loop."""
    losses, valid = s.new_zeros(len(s)), torch.zeros(len(s), dtype=torch.bool)
    for i in range(len(s)):
        left = ~same[i]
        if left.any():
            p, q = t[i, left].softmax(0), s[i, left].log_softmax(0)
            losses[i], valid[i] = (p * (p.log() - q)).sum(), True
    return losses, valid


@pytest.mark.parametrize("scale", (14.3, 3000.0), ids=("", "own shifts"))
@pytest.mark.parametrize("which", ("some", "itself", "a whole row", "everything"))
@pytest.mark.parametrize("backend", ALL)
def test_masked_pairs_leave_both_distributions(backend, which, scale):
    x, y, teacher_x, teacher_y = (t.double() for t in features(30, 30, 7, 9, seed=0))
    row_ids, col_ids = {
        "some": (torch.arange(30) // 3, torch.arange(30) % 12),
        "itself": (torch.arange(30), torch.arange(30)),
        "a whole row": (torch.arange(30).clamp(max=1), torch.zeros(30, dtype=torch.int64)),
        "everything": (torch.zeros(30, dtype=torch.int64), torch.zeros(30, dtype=torch.int64)),
    }[which]
    leaves = [x, y, torch.tensor(scale, dtype=torch.float64)]
    for t in leaves:
        t.requires_grad_()
    s, t = leaves[2] * x @ y.T, 20.0 * teacher_x @ teacher_y.T
    same = row_ids[:, None] == col_ids
    rows, row_valid = masked_dense(s, t, same)
    cols, col_valid = masked_dense(s.T, t.T, same.T)
    weights = torch.randn(60, generator=torch.Generator().manual_seed(1)).double()
    want = [rows, cols]
    if row_valid.any():
        want += torch.autograd.grad((torch.cat([rows, cols]) * weights).sum(), leaves)
    narrow = torch.float64 if backend == "reference" else torch.float32
    mine = [t.detach().to(narrow).requires_grad_() for t in leaves]
    args = (*mine, teacher_x.to(narrow), teacher_y.to(narrow), 20.0)
    options = {"mask_ids": (row_ids, col_ids), "backend": backend}
    got = list(similarity_distill(*args, reduction="none", **options))
    got += torch.autograd.grad((torch.cat(got) * weights.to(narrow)).sum(), mine)
    for i, value in enumerate(got):
        if i >= len(want):
            assert (value == 0).all()
        else:
            norm = max(1.0, want[i].norm().item())
            assert (value.double() - want[i]).norm() < 5e-6 * norm * max(1.0, scale / 100), i
    mean = similarity_distill(*args, **options)
    assert mean.isnan() if not row_valid.any() else torch.isclose(
        mean.double(), (rows[row_valid].mean() + cols[col_valid].mean()) / 2, rtol=1e-4
    )  # fmt: skip


def test_one_tensor_of_ids_stands_for_both():
    x, y, teacher_x, teacher_y = features(12, 12, 5, 5, seed=0)
    ids = torch.arange(12) // 2
    one, two = (
        similarity_distill(x, y, 9.0, teacher_x, teacher_y, 9.0, mask_ids=given_ids)
        for given_ids in (ids, (ids, ids.clone()))
    )
    assert one == two


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ALL)
def test_reductions_and_directions(backend, kind):
    x, y, teacher_x, teacher_y = features(30, 21, 7, 5, seed=1)
    s, t = 5.0 * x @ y.T, 9.0 * teacher_x @ teacher_y.T
    want = []
    for a, b in ((s, t), (s.T, t.T)):
        entropy = (b.softmax(1) * b.log_softmax(1)).sum(1) if kind == "kl" else 0
        want.append(F.cross_entropy(a, b.softmax(1), reduction="none") + entropy)

    def call(**options):
        return similarity_distill(
            x, y, 5.0, teacher_x, teacher_y, torch.tensor([9.0]), kind=kind, backend=backend,
            **options,
        )  # fmt: skip

    close = torch.testing.assert_close
    rows, cols = call(reduction="none")
    close(rows, want[0], rtol=1e-5, atol=1e-6)
    close(cols, want[1], rtol=1e-5, atol=1e-6)
    close(call(), (rows.mean() + cols.mean()) / 2)
    close(call(reduction="sum"), (rows.sum() + cols.sum()) / 2)
    close(call(directions="rows"), rows.mean())
    close(call(directions="columns", reduction="sum"), cols.sum())
    close(call(directions="columns", reduction="none"), cols)


@pytest.mark.parametrize("backend", FAST)
def test_upstream_gradients_of_rows_and_columns(backend):
    given_features = features(70, 90, 9, 5, seed=2)
    weights = torch.randn(160, generator=torch.Generator().manual_seed(0))

    def weighted(*args, backend):
        both = similarity_distill(*args, reduction="none", backend=backend)
        return (torch.cat(both) * weights).sum()

    wide = tuple(t.double() for t in given_features)
    want = run(weighted, wide, 20.0, 14.0, backend="reference")
    got = run(weighted, given_features, 20.0, 14.0, backend=backend)
    assert max(errors(got, want).values()) < 2e-5


@pytest.mark.parametrize("backend", ALL)
def test_the_teacher_gets_no_gradient(backend):
    x, y, teacher_x, teacher_y = features(12, 9, 5, 4, seed=0)
    teacher = [t.requires_grad_() for t in (teacher_x, teacher_y, torch.tensor(7.0))]
    loss = similarity_distill(x.requires_grad_(), y, 5.0, *teacher, backend=backend)
    loss.backward()
    assert x.grad is not None and all(t.grad is None for t in teacher)


@pytest.mark.parametrize("backend", ALL)
def test_nan_in_gives_nan_out(backend):
    for spoil in range(4):
        given_features = features(20, 9, 7, 5, seed=0)
        given_features[spoil][2, 3] = torch.nan
        got = run(similarity_distill, given_features, 10.0, 10.0, backend=backend)
        for name, value in got.items():
            assert value.isnan().any(), (spoil, name)
    for scales in ((torch.nan, 1.0), (1.0, torch.nan)):
        got = run(similarity_distill, features(20, 9, 7, 5, seed=0), *scales, backend=backend)
        assert all(value.isnan().any() for value in got.values()), scales


@pytest.mark.parametrize("backend", ALL)
def test_infinite_features_are_never_silently_finite(backend):
    for spoil in range(4):
        given_features = features(20, 9, 7, 5, seed=0)
        given_features[spoil][3, 2] = torch.inf
        x, y, *teacher = given_features
        assert not similarity_distill(x, y, 10.0, *teacher, 10.0, backend=backend).isfinite()


@pytest.mark.parametrize("shape", ((0, 5), (5, 0), (0, 0)), ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_empty_batch_is_as_in_torch(backend, shape):
    x, y, teacher_x, teacher_y = features(*shape, 3, 4, seed=0)
    x.requires_grad_()
    args = (x, y, 1.0, teacher_x, teacher_y, 1.0)
    assert similarity_distill(*args, backend=backend).isnan()
    total = similarity_distill(*args, reduction="sum", backend=backend)
    assert total == 0
    total.backward()
    assert x.grad.shape == x.shape and not x.grad.any()


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


@pytest.mark.parametrize("student", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("teacher", (torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("backend", ("reference", "chunked", None))
def test_a_teacher_of_another_dtype_keeps_its_digits(backend, student, teacher):
    x, y, teacher_x, teacher_y = features(20, 30, 16, 8, seed=0)
    given = (x.to(student), y.to(student), teacher_x.to(teacher), teacher_y.to(teacher))
    want = truth(given, 14.0, 20.0)
    got = run(similarity_distill, given, 14.0, 20.0, backend=backend)
    assert got["loss"].dtype == (torch.float64 if teacher == torch.float64 else torch.float32)
    assert got["x"].dtype == got["y"].dtype == student and got["scale"].dtype == torch.float32
    assert abs(got["loss"] - want["loss"]) < 1e-6 * want["loss"]
    assert errors(got, want)["x"] < (5e-3 if student == torch.bfloat16 else 1e-6)


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
    assert got["loss"] == pytest.approx(want["loss"].item(), rel=1e-5)
    assert got["scale"] == pytest.approx(want["scale"].item(), rel=1e-5)
    for name, count in (("x", n), ("y", m)):
        torch.testing.assert_close(
            got[name][-8:].double() * (count // 8), want[name], rtol=1e-4, atol=1e-6
        )


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
