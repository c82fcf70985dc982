"""similarity_distill: values and gradients against float64, and distributions that nearly agree."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from clip_oracle import errors, needs_native
from distill_oracle import dense, features, near, run, truth
from properties import given, settings, st
from torch import Tensor

from m3bind.ops import similarity_distill

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
ALL = ("reference", *FAST)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("kl", "ce")
# (N, M, D, E, scale of the student, of the teacher). Panels are 512 to 1024 rows, blocks 64,
# vectors 4, 8 or 16 wide, tiles 2048 columns.
CASES = (
    (1, 7, 3, 5, 14.3, 100.0),  # one row: the columns' distributions have one value
    (3, 2, 1, 1, 14.3, 14.3),  # one feature
    (48, 130, 33, 7, 100.0, 14.3),  # less than one block; the student sharper
    (252, 123, 7, 123, 14.3, 100.0),  # a tail of 12 rows; the teacher sharper
    (5, 2100, 16, 8, 30.0, 30.0),  # more than one tile of columns
    (1100, 200, 64, 32, 100.0, 100.0),  # more than one panel, the last one ragged
    (70, 90, 16, 16, -30.0, 3000.0),  # a negative scale; logits beyond a common shift
)
# Beside 1.5 x plain PyTorch's own error, worst of 5 seeds. The scale's gradient is one number, a
# sum that cancels, so its rounding is not averaged; the loss of a student close by cancels too.
TOLERANCE = {"loss": 4e-7, "x": 4e-7, "y": 4e-7, "scale": 2e-6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m", "d", "e", "scale", "teacher_scale"), CASES)
@pytest.mark.parametrize("backend", FAST)
def test_error_against_float64(backend, n, m, d, e, scale, teacher_scale, kind, dtype):
    worst: dict[str, list[float]] = {name: [0.0, 0.0] for name in TOLERANCE}
    for seed in range(5):
        given_features = features(n, m, d, e, seed=seed, dtype=dtype)
        want = truth(given_features, scale, teacher_scale, kind=kind)
        for i, (loss, options) in enumerate(
            ((similarity_distill, {"backend": backend}), (dense, {}))
        ):
            got = run(loss, given_features, scale, teacher_scale, kind=kind, **options)
            for name, error in errors(got, want).items():
                worst[name][i] = max(worst[name][i], error)
    for name, (mine, plain_torch) in worst.items():
        assert mine <= 1.5 * plain_torch + TOLERANCE[name], (name, mine, plain_torch)


@pytest.mark.parametrize("common", (0.0, 3.0), ids=("", "with a common direction"))
@pytest.mark.parametrize(
    "scales", ((1.0, 3000.0), (14.3, 100.0), (100.0, 14.3), (5.0, 1.0)), ids=str
)
@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_rounds_the_result_alone(backend, scales, common):
    # Derivatives of a one-hot teacher are 1 / 251, which bfloat16 misses by 0.3 %; those of a row
    # sum up to 0, so a direction that all features share must leave nothing behind.
    worst = [0.0, 0.0]
    for seed in range(5):
        given_features = tuple(
            F.normalize(t + common * t[:1], dim=1).bfloat16()
            for t in features(251, 251, 64, 64, seed=seed)
        )
        want = truth(given_features, *scales)
        plain = errors(run(dense, given_features, *scales), want)
        mine = errors(run(similarity_distill, given_features, *scales, backend=backend), want)
        for i, found in enumerate((mine, plain)):
            worst[i] = max(worst[i], found["x"], found["y"])
    # The panel of many small derivatives is rounded as well, and that averages out: hence not 1.
    assert worst[0] <= 1.2 * worst[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_in_float64(kind):
    # log_softmax in another order: the two agree to float64's rounding.
    given_features = tuple(t.double() for t in features(20, 31, 7, 9, seed=0))
    want = run(dense, given_features, 14.3, 50.0, kind=kind)
    got = run(similarity_distill, given_features, 14.3, 50.0, kind=kind, backend="reference")
    assert max(errors(got, want).values()) < 1e-13


@given(
    n=st.integers(1, 90),
    m=st.integers(1, 90),
    d=st.integers(1, 40),
    e=st.integers(1, 40),
    scale=st.floats(-20, 100),
    teacher_scale=st.floats(-20, 100),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("backend", FAST)
def test_any_shape_and_scale(backend, n, m, d, e, scale, teacher_scale, kind, seed):
    given_features = features(n, m, d, e, seed=seed)
    want = truth(given_features, scale, teacher_scale, kind=kind)
    got = run(similarity_distill, given_features, scale, teacher_scale, kind=kind, backend=backend)
    # float32 dot products err by 1e-7, which the scales multiply.
    size = abs(scale) + abs(teacher_scale)
    assert abs(got["loss"] - want["loss"]) <= 1e-6 + 1e-6 * size + 1e-6 * want["loss"]
    for name in ("x", "y"):
        assert (got[name] - want[name]).norm() <= (2e-6 + 4e-7 * size) * size + 1e-7, name


def test_by_hand():
    # The teacher sees 0.8 and 0.2, the student 0.5 and 0.5.
    teacher = torch.tensor([[0.8, 0.2]]).log()
    one = torch.ones(2, 1)
    for backend in ("reference", "chunked", None):
        got = [
            similarity_distill(
                torch.zeros(1, 1), one, 1.0, teacher, torch.eye(2), 1.0, kind=kind,
                directions="rows", backend=backend,
            ).item()
            for kind in KINDS
        ]  # fmt: skip
        assert got == pytest.approx([0.192745, 0.693147], rel=1e-5)


@pytest.mark.parametrize("scale", (14.3, 100.0, 3000.0), ids=("", "large", "own shifts"))
@pytest.mark.parametrize("shape", ((33, 50), (1100, 70)), ids=("one panel", "two panels"))
@pytest.mark.parametrize("backend", FAST)
def test_student_and_teacher_alike_have_exactly_nothing(backend, shape, scale):
    x, y, _, _ = features(*shape, 16, 16, seed=0)
    got = run(similarity_distill, (x, y, x, y), scale, scale, backend=backend)
    for name, value in got.items():
        assert (value == 0).all(), name


@pytest.mark.parametrize("distance", (1e-2, 1e-3, 1e-4, 1e-5))
@pytest.mark.parametrize("shape", ((33, 50), (1100, 70)), ids=("one panel", "two panels"))
@pytest.mark.parametrize("backend", FAST)
def test_nearly_equal_distributions_keep_their_digits(backend, shape, distance):
    given_features = near(*features(*shape, 16, 16, seed=0)[:2], distance)
    want = truth(given_features, 14.3, 14.3)
    got = run(similarity_distill, given_features, 14.3, 14.3, backend=backend)
    # What remains is the rounding of the dot products, 6e-8, against their differences; in the
    # loss, a sum, much of it averages out.
    assert errors(got, want)["loss"] < 4e-6 + 5e-9 / distance
    assert max(errors(got, want).values()) < 4e-6 + 2e-7 / distance
    rows, columns = similarity_distill(
        *given_features[:2], 14.3, *given_features[2:], 14.3, reduction="none", backend=backend
    )
    assert (rows >= 0).all() and (columns >= 0).all()
    if distance < 1e-4:  # the formula that subtracts finished distributions has none left
        plain = run(dense, given_features, 14.3, 14.3)
        assert errors(plain, want)["loss"] > 100 * errors(got, want)["loss"]


@pytest.mark.parametrize("backend", FAST)
def test_equal_distributions_of_other_widths_and_offsets(backend):
    # The student's rows carry an offset that its softmax does not see.
    x, y, _, _ = features(40, 60, 16, 16, seed=0)
    x, offset = torch.cat([x, torch.linspace(0, 3, 40)[:, None]], 1), torch.ones(60, 1)
    loss = similarity_distill(
        x, torch.cat([y, offset], 1), 10.0, x[:, :16], y, 10.0, directions="rows", backend=backend
    )
    assert abs(loss) < 1e-6


def as_features(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices whose product is `logits`, exactly."""
    return logits.float(), torch.eye(logits.shape[1])


def far_apart_rows() -> Tensor:
    logits = torch.zeros(8, 8)
    logits[2], logits[3] = 100.0, -100.0  # inf * 0 with one exponential and one shift
    return logits


RANDOM = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
HARD = {
    "all equal": torch.zeros(8, 8),
    "all -120": torch.full((8, 8), -120.0),
    "all +120": torch.full((8, 8), 120.0),
    "one row at +100 beside one at -100": far_apart_rows(),
    "one column at +100 beside one at -100": far_apart_rows().T.contiguous(),
    "separated by 60": 60.0 * torch.eye(8) - 30.0,
    "separated by 1000": 1000.0 * torch.eye(8),
    "one huge row": torch.cat([torch.full((1, 8), 1e4), RANDOM[1:]]),
    "random": RANDOM,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("student", "teacher"), list(itertools.product(HARD, HARD)))
@pytest.mark.parametrize("backend", FAST)
def test_hard_logits(backend, student, teacher, kind):
    given_features = (*as_features(HARD[student]), *as_features(HARD[teacher]))
    want = truth(given_features, 1.0, 1.0, kind=kind)
    got = run(similarity_distill, given_features, 1.0, 1.0, kind=kind, backend=backend)
    largest = max(HARD[student].abs().max().item(), HARD[teacher].abs().max().item())
    for key, value in want.items():
        assert torch.isfinite(got[key]).all(), key
        # Absolute: what the logits' own rounding in float32 makes of values of this size.
        size = max(1.0, value.abs().max().item(), largest)
        assert (got[key].double() - value).abs().max() <= 1e-6 * size, key


@pytest.mark.parametrize("backend", FAST)
def test_first_panel_far_below_the_second(backend):
    low = torch.cat([torch.full((1024, 40), -3000.0), RANDOM[:1].repeat(76, 5)])
    for given_features in (
        (*as_features(low), *as_features(low + RANDOM[0].repeat(5))),
        (*as_features(low.flip(0)), *as_features(low)),
    ):
        want = truth(given_features, 1.0, 1.0)
        got = run(similarity_distill, given_features, 1.0, 1.0, backend=backend)
        for key, value in want.items():
            size = max(3000.0, value.abs().max().item())
            assert (got[key].double() - value).abs().max() <= 1e-6 * size, key


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_teacher_that_finds_its_best_in_the_last_panel(backend, seed):
    """A column's sums of the teacher, thousands of equals, become nothing beside one late logit:
    what was rounded in them must not stay behind in the student's."""
    generator = torch.Generator().manual_seed(seed)
    student = -50 - 5 * torch.rand(8000, 1, generator=generator)
    teacher = 2 * torch.rand(8000, 1, generator=generator)
    student[0], teacher[7900] = 0.3, 105.123
    one = torch.ones(1, 1)
    given_features = (student, one, teacher, one)
    want = truth(given_features, 1.0, 1.0)
    got = run(similarity_distill, given_features, 1.0, 1.0, backend=backend)
    for key in ("loss", "x"):
        assert (got[key].double() - want[key]).norm() <= 4e-7 * want[key].norm(), key
