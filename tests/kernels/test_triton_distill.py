"""similarity_distill in Triton: float64 oracle, nearly equal and hard logits, memory poisoned.

On the CPU under the interpreter (see test_triton_interpreter.py), on a GPU where there is one.
"""

import pytest
import torch
import torch.nn.functional as F
from clip_oracle import errors
from crossed import crossed, slow
from distill_oracle import dense, features, near, run, truth
from test_similarity_distill import HARD, KINDS, as_features
from test_similarity_distill_features import masked_dense
from test_triton_stats import DEVICE, DTYPES, moved, poisoned_memory  # noqa: F401

from m3bind.ops import similarity_distill
from m3bind_kernels import launch, merge, waves

# (N, M, D, E, scale of the student, of the teacher). The interpreter's tiles are 64 x 64, in pieces
# of 32 columns.
SHAPES = (
    (1, 7, 3, 5, 14.3, 100.0),  # one row: the columns' distributions have one value
    (3, 2, 1, 1, 14.3, 14.3),  # one feature
    (48, 70, 300, 7, 100.0, 14.3),  # many steps over the features; the student sharper
    (101, 131, 7, 70, 14.3, 100.0),  # nothing is a multiple of anything; the teacher sharper
    (65, 66, 16, 16, -30.0, 3000.0),  # a negative scale; logits beyond a common shift
)
# Beside 1.5 x plain PyTorch's own error, worst of 5 seeds, as in test_similarity_distill.py.
TOLERANCE = {"loss": 4e-7, "x": 6e-7, "y": 6e-7, "scale": 4e-6}


def run_triton(given, scale, teacher_scale, **options):
    def step(x, y, s, teacher_x, teacher_y, t, **rest):
        loss = similarity_distill(
            x.to(DEVICE), y.to(DEVICE), s.to(DEVICE), teacher_x.to(DEVICE), teacher_y.to(DEVICE),
            t, backend="triton", **rest,
        )  # fmt: skip
        return loss.cpu()

    return run(step, given, scale, teacher_scale, **{k: moved(v) for k, v in options.items()})


def worst_errors(batches, scales, **options):
    """Of all batches: the worst of ours and of plain PyTorch's, per result."""
    worst = {name: [0.0, 0.0] for name in TOLERANCE}
    for given in batches:
        want = truth(given, *scales, **options)
        found = (run_triton(given, *scales, **options), run(dense, given, *scales, **options))
        for i, got in enumerate(found):
            for name, error in errors(got, want).items():
                worst[name][i] = max(worst[name][i], error)
    return worst


def check_rule(batches, scales, **options):
    for name, (mine, plain) in worst_errors(batches, scales, **options).items():
        assert mine <= 1.5 * plain + TOLERANCE[name], (name, mine, plain)


def batches(n, m, d, e, dtype):
    return (features(n, m, d, e, seed=seed, dtype=dtype) for seed in range(5))


@pytest.mark.parametrize(("numbered", "dtype"), crossed(list(enumerate(SHAPES)), DTYPES), ids=str)
def test_shape_against_float64(numbered, dtype):
    number, shape = numbered
    *sizes, scale, teacher_scale = shape
    kind = KINDS[(number + DTYPES.index(dtype)) % 2]
    check_rule(batches(*sizes, dtype), (scale, teacher_scale), kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("number", "shape"), list(enumerate(SHAPES)), ids=str)
def test_shape_with_the_other_kind(number, shape, dtype):
    *sizes, scale, teacher_scale = shape
    kind = KINDS[(number + DTYPES.index(dtype) + 1) % 2]
    check_rule(batches(*sizes, dtype), (scale, teacher_scale), kind=kind)


@pytest.fixture
def many_waves(monkeypatch):
    """As for very large matrices: rounded derivatives, several bands of rows, several waves."""
    monkeypatch.setattr(waves, "PRECISE_PAIRS", 0)
    monkeypatch.setattr(waves, "WAVE_BYTES", 0)
    monkeypatch.setattr(waves, "WAVE_ROWS", 64)
    monkeypatch.setattr(merge, "PART_BYTES", 0)


@pytest.mark.parametrize(
    "scales",
    [(1.0, 3000.0), slow((30, 14.3)), slow((100, 14.3))],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_waves_against_float64(many_waves, dtype, scales):
    """Among them a teacher whose rows are one-hot: its derivatives are all alike."""
    check_rule(batches(140, 67, 40, 24, dtype), scales)


@pytest.mark.parametrize(
    "common",
    (slow(0.0), 3.0),
    ids=("", "with a common direction"),
)
def test_bfloat16_rounds_the_result_alone(many_waves, common):
    """Derivatives of a row sum up to 0: a direction that all features share leaves nothing."""
    given = [
        tuple(F.normalize(t + common * t[:1], dim=1).bfloat16() for t in batch)
        for batch in batches(131, 67, 64, 64, torch.float32)
    ]
    worst = worst_errors(given, (1.0, 3000.0))
    for name in ("x", "y"):
        assert worst[name][0] <= 1.2 * worst[name][1], name


@pytest.mark.parametrize("scale", (14.3, 3000.0), ids=("", "own shifts"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_student_and_teacher_alike_have_exactly_nothing(many_waves, dtype, scale):
    x, y, _, _ = features(70, 90, 16, 16, seed=0, dtype=dtype)
    for name, value in run_triton((x, y, x, y), scale, scale).items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("distance", (1e-2, 1e-3, 1e-4, 1e-5))
def test_nearly_equal_distributions_keep_their_digits(distance):
    given = near(*features(70, 90, 16, 16, seed=0)[:2], distance)
    want, got = truth(given, 14.3, 14.3), run_triton(given, 14.3, 14.3)
    # What remains is the rounding of the dot products, as in test_similarity_distill.py.
    assert errors(got, want)["loss"] < 4e-6 + 5e-9 / distance
    assert max(errors(got, want).values()) < 4e-6 + 2e-7 / distance
    rows, columns = similarity_distill(
        *(t.to(DEVICE) for t in given[:2]), 14.3, *(t.to(DEVICE) for t in given[2:]), 14.3,
        reduction="none", backend="triton",
    )  # fmt: skip
    assert (rows >= 0).all() and (columns >= 0).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_student_close_to_its_teacher_keeps_its_gradient(many_waves, dtype):
    """Its derivatives are so small that float16 would lose them."""
    x, y, _, _ = features(140, 131, 16, 16, seed=0)
    given = tuple(t.to(dtype) for t in (x, y, x, y))
    scales = (14.3, 14.3 * (1 + 2.0**-20))
    want, got = truth(given, *scales), run_triton(given, *scales)
    # One step of a float32 scale is 2^-24 of it: the difference itself has no more digits. Only
    # bfloat16 holds gradients of this size.
    names = ("scale",) if dtype == torch.float16 else ("scale", "x", "y")
    for name in names:
        assert errors(got, want)[name] < 0.2, name


@pytest.mark.parametrize("kind", (KINDS[0], slow(KINDS[1])))
@pytest.mark.parametrize("student", HARD)
def test_hard_logits(student, kind):
    for teacher in HARD:
        given = (*as_features(HARD[student]), *as_features(HARD[teacher]))
        want = truth(given, 1.0, 1.0, kind=kind)
        got = run_triton(given, 1.0, 1.0, kind=kind)
        largest = max(HARD[student].abs().max().item(), HARD[teacher].abs().max().item())
        for key, value in want.items():
            assert torch.isfinite(got[key]).all(), (teacher, key)
            # Absolute: what the logits' own rounding in float32 makes of values of this size.
            size = max(1.0, value.abs().max().item(), largest)
            assert (got[key].double() - value).abs().max() <= 1e-6 * size, (teacher, key)


def test_first_rows_far_below_the_others(many_waves):
    some = torch.randn(8, generator=torch.Generator().manual_seed(0))
    low = torch.cat([torch.full((70, 80), -3000.0), some.repeat(30, 10)])
    for given in (
        (*as_features(low), *as_features(low + some.repeat(10))),
        (*as_features(low.flip(0)), *as_features(low)),
    ):
        want, got = truth(given, 1.0, 1.0), run_triton(given, 1.0, 1.0)
        for key, value in want.items():
            size = max(3000.0, value.abs().max().item())
            assert (got[key].double() - value).abs().max() <= 1e-6 * size, key


@pytest.mark.parametrize("scale", (14.3, 3000.0), ids=("", "own shifts"))
@pytest.mark.parametrize("which", ("some", "itself", "a whole row", "everything"))
def test_masked_pairs_leave_both_distributions(which, scale):
    n = 70
    ids = torch.arange(n)
    row_ids, col_ids = {
        "some": (ids // 3, ids % 12),
        "itself": (ids, ids),
        "a whole row": (ids.clamp(max=1), torch.zeros_like(ids)),
        "everything": (torch.zeros_like(ids), torch.zeros_like(ids)),
    }[which]
    given = features(n, n, 7, 9, seed=0)
    x, y, teacher_x, teacher_y = (t.double() for t in given)
    leaves = [x, y, torch.tensor(scale, dtype=torch.float64)]
    for t in leaves:
        t.requires_grad_()
    s, t = leaves[2] * x @ y.T, 20.0 * teacher_x @ teacher_y.T
    same = row_ids[:, None] == col_ids
    (rows, valid), (cols, _) = masked_dense(s, t, same), masked_dense(s.T, t.T, same.T)
    weights = torch.randn(2 * n, generator=torch.Generator().manual_seed(1))
    want = [rows, cols]
    if valid.any():
        want += torch.autograd.grad((torch.cat([rows, cols]) * weights).sum(), leaves)
    mine = [t.detach().float().to(DEVICE).requires_grad_() for t in leaves]
    got = list(
        similarity_distill(
            *mine, *(t.to(DEVICE) for t in given[2:]), 20.0, reduction="none",
            mask_ids=(row_ids.to(DEVICE), col_ids.to(DEVICE)), backend="triton",
        )
    )  # fmt: skip
    got += torch.autograd.grad((torch.cat(got) * weights.to(DEVICE)).sum(), mine)
    for i, value in enumerate(got):
        if i >= len(want):
            assert (value == 0).all()
        else:
            norm = max(1.0, want[i].norm().item()) * max(1.0, scale / 100)
            assert (value.cpu().double() - want[i]).norm() < 5e-6 * norm, i


@pytest.mark.parametrize("student", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", DTYPES, ids=str)
def test_a_teacher_of_another_dtype_keeps_its_digits(many_waves, student, teacher):
    x, y, teacher_x, teacher_y = features(70, 66, 16, 8, seed=0)
    given = (x.to(student), y.to(student), teacher_x.to(teacher), teacher_y.to(teacher))
    want, got = truth(given, 14.0, 20.0), run_triton(given, 14.0, 20.0)
    assert got["x"].dtype == got["y"].dtype == student and got["scale"].dtype == torch.float32
    assert abs(got["loss"] - want["loss"]) < 1e-6 * want["loss"]
    assert errors(got, want)["x"] < (5e-3 if student != torch.float32 else 1e-6)


def test_upstream_gradients_of_rows_and_columns(many_waves):
    given = features(70, 90, 9, 5, seed=2)
    weights = torch.randn(160, generator=torch.Generator().manual_seed(0))

    def weighted(*args, backend):
        both = similarity_distill(*args, reduction="none", backend=backend)
        return (torch.cat(both) * weights.to(both[0].device)).sum()

    want = run(weighted, tuple(t.double() for t in given), 20.0, 14.0, backend="reference")
    got = run(weighted, tuple(t.to(DEVICE) for t in given), 20.0, 14.0, backend="triton")
    assert max(errors({k: t.cpu() for k, t in got.items()}, want).values()) < 2e-5


def test_nan_in_gives_nan_out(many_waves):
    for dtype in (torch.float32, torch.bfloat16):
        for spoil in range(4):
            given = features(70, 9, 7, 5, seed=0, dtype=dtype)
            given[spoil][2, 3] = torch.nan
            for name, value in run_triton(given, 10.0, 10.0).items():
                assert value.isnan().any(), (dtype, spoil, name)
        for scales in ((torch.nan, 1.0), (1.0, torch.nan)):
            got = run_triton(features(20, 9, 7, 5, seed=0, dtype=dtype), *scales)
            assert all(value.isnan().any() for value in got.values()), scales
    for spoil in range(4):
        given = features(20, 9, 7, 5, seed=0)
        given[spoil][3, 2] = torch.inf
        x, y, *teacher = (t.to(DEVICE) for t in given)
        assert not similarity_distill(x, y, 10.0, *teacher, 10.0, backend="triton").isfinite()


@pytest.mark.parametrize("shape", ((0, 5), (5, 0), (0, 0)), ids=str)
def test_empty(shape):
    x, y, *teacher = (t.to(DEVICE) for t in features(*shape, 3, 4, seed=0))
    x.requires_grad_()
    args = (x, y, 1.0, *teacher, 1.0)
    assert similarity_distill(*args, backend="triton").isnan()
    total = similarity_distill(*args, reduction="sum", backend="triton")
    assert total == 0
    total.backward()
    assert x.grad.shape == x.shape and not x.grad.any()


def test_bit_equal_from_run_to_run(many_waves):
    given = features(150, 90, 40, 24, seed=0, dtype=torch.bfloat16)
    first, second = (run_triton(given, 30.0, 50.0) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_descriptors_and_pointers_agree(many_waves, monkeypatch):
    given = features(150, 90, 40, 24, seed=0, dtype=torch.bfloat16)
    monkeypatch.setattr(launch, "can_describe", lambda device: True)
    described = run_triton(given, 30.0, 50.0)
    monkeypatch.setattr(launch, "can_describe", lambda device: False)
    for name, value in run_triton(given, 30.0, 50.0).items():
        assert torch.equal(value, described[name]), name


def test_opcheck_strides_and_wanted_gradients():
    x, y, *teacher = (t.to(DEVICE) for t in features(13, 17, 7, 5, seed=0))
    scale, teacher_scale = torch.tensor(9.0, device=DEVICE), torch.tensor(5.0, device=DEVICE)
    ids = torch.arange(17, dtype=torch.int32, device=DEVICE)
    rest = (*teacher, teacher_scale, ids[:13], ids)
    forward = torch.ops.m3bind.similarity_distill_fwd.default
    leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
    torch.library.opcheck(forward, (*leaves, *rest, True, 9, "triton"))  # of which it keeps none
    row_loss, col_loss, *held = forward(x, y, scale, *rest, True, 0, "triton")
    backward = torch.ops.m3bind.similarity_distill_bwd.default
    for wanted in ((True, False), (False, True)):
        torch.library.opcheck(
            backward, (x, y, scale, *rest, *held, row_loss, col_loss, *wanted, "triton")
        )
    given = (scale, *teacher, teacher_scale)
    strided = similarity_distill(x.T.contiguous().T, y[:, :], *given, backend="triton")
    assert torch.equal(strided, similarity_distill(x, y, *given, backend="triton"))
