"""Features in any combination, few rows and fewer ids, and logits of any size.

Rows and columns without a positive, without anything left, none at all.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from clip_oracle import needs_native, run
from drawn import DIRECTIONS, MASKS, POSITIVES, SEEDS, SHAPES, Draw
from feature_oracle import feature_loss
from properties import given, settings, st
from siglip_oracle import float64_loss as siglip_truth
from torch import Tensor

from m3bind.ops import clip_loss, siglip_loss, similarity_distill, similarity_lse

FAST = ("chunked", pytest.param("cpp", marks=needs_native))
ALL = ("reference", *FAST)


def check(loss: Any, truth: Any, x: Tensor, y: Tensor) -> None:
    def with_all_gradients(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return truth(x, y, scale) + 0 * (x.sum() + y.sum() + scale)

    want = run(with_all_gradients, x.double(), y.double(), 2.0)
    got = run(loss, x, y, 2.0)
    for name, value in want.items():
        assert (got[name] - value).norm() <= 2e-5 * value.norm() + 2e-5, name


@given(
    **SHAPES, kind=st.sampled_from(POSITIVES), kinds=MASKS,
    negatives=st.sampled_from([None, (3,), (-1, 2)]), seed=SEEDS, directions=DIRECTIONS,
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]), z_loss=st.sampled_from([0.0, 0.01]),
    margin=st.sampled_from([0.0, 0.2]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("backend", ALL)
def test_clip_loss(backend, n, m, d, kind, kinds, negatives, seed, margin, **options):
    draw = Draw(seed)
    x, y = draw.normal(n, d), draw.normal(m, d)
    options |= draw.positives(n, m, kind) | draw.masks(n, m, kinds) | {"reduction": "sum"}
    if "soft_targets" not in options:
        options["margin"] = margin
    exact = dict(options)
    if negatives:
        options["negatives"] = draw.normal(*(n if size < 0 else size for size in negatives), d)
        exact["negatives"] = options["negatives"].double()
    check(partial(clip_loss, **options, backend=backend), partial(feature_loss, **exact), x, y)


@given(**SHAPES, kind=st.sampled_from(POSITIVES[:3]), kinds=MASKS, seed=SEEDS)
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("backend", ALL)
def test_siglip_loss(backend, n, m, d, kind, kinds, seed):
    draw = Draw(seed)
    x, y = draw.normal(n, d), draw.normal(m, d)
    options = draw.positives(n, m, kind) | draw.masks(n, m, kinds)
    options |= {"logit_bias": -1.0, "reduction": "sum"}
    exact = dict(options)
    exact["bias"] = exact.pop("logit_bias")
    check(partial(siglip_loss, **options, backend=backend), partial(siglip_truth, **exact), x, y)


@given(**SHAPES, kind=st.sampled_from(["kl", "ce"]), kinds=MASKS, seed=SEEDS, directions=DIRECTIONS)
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("backend", ALL)
def test_similarity_distill(backend, n, m, d, kind, kinds, seed, directions):
    draw = Draw(seed)
    x, y, teacher_x, teacher_y = (draw.normal(*shape) for shape in [(n, d), (m, d), (n, 5), (m, 5)])
    options = draw.masks(n, m, kinds) | {"directions": directions}

    def truth(x: Tensor, y: Tensor, scale: Tensor) -> Any:
        teacher = 3 * teacher_x.double() @ teacher_y.double().T
        rows, cols = options.get("mask_ids", (torch.arange(n), torch.arange(n, n + m)))
        left = rows[:, None] != cols
        sides = {"rows": (scale * x @ y.T, teacher, left)}
        sides["columns"] = tuple(t.T for t in sides["rows"])
        wanted = sides if directions == "both" else (directions,)
        total = 0
        for name in wanted:
            for student, taught, here in zip(*sides[name], strict=True):
                if here.any():
                    log_q, log_p = student[here].log_softmax(0), taught[here].log_softmax(0)
                    total += (log_p.exp() * ((log_p if kind == "kl" else 0) - log_q)).sum()
        return total / len(wanted)

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return similarity_distill(
            x, y, scale, teacher_x, teacher_y, 3.0, kind=kind, reduction="sum", backend=backend,
            **options,
        )  # fmt: skip

    check(loss, truth, x, y)


HUGE = [sign * 10.0**power for power in (6, 9, 9.5, 10, 12, 15, 20, 30, 36) for sign in (1, -1)]


@pytest.mark.parametrize("scale", HUGE)
@pytest.mark.parametrize("backend", ALL)
def test_logits_whose_rounding_is_larger_than_what_is_exponentiated(backend, scale):
    draw = Draw(0)
    x, y = (torch.nn.functional.normalize(draw.normal(8, 16), dim=1) for _ in range(2))
    teacher = x, y.flip(0)
    halves = torch.arange(8) // 2
    losses = [
        lambda *a, **k: clip_loss(*a, **k),
        lambda *a, **k: clip_loss(*a, directions="rows", **k),
        lambda *a, **k: clip_loss(*a, label_smoothing=0.1, margin=0.2, mask_ids=halves, **k),
        lambda *a, **k: torch.cat(similarity_lse(*a, **k)).sum(),
        lambda *a, **k: similarity_distill(*a, *(t.to(a[0].dtype) for t in teacher), 3.0, **k),
    ]
    for loss in losses:
        rounded = torch.tensor(scale)
        want = run(partial(loss, backend="reference"), x.double(), y.double(), rounded.double())
        got = run(partial(loss, backend=backend), x, y, rounded)
        for name, value in want.items():
            assert (got[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("scale", HUGE)
@pytest.mark.parametrize("backend", FAST)
def test_equals_share_what_is_left_at_any_scale(backend, scale):
    """Each row has an equal; integers have exact dot products, of which equals have the same."""
    one = Draw(0).integers(-3, 4, 4 * 16).reshape(4, 16).float()
    x = one.repeat_interleave(2, 0)
    y = x if scale > 0 else -x
    for options in ({}, {"directions": "rows"}, {"memory_budget": 0}):
        got = clip_loss(x, y, scale, backend=backend, **options)
        assert got.item() == pytest.approx(math.log(2), rel=1e-5), options


@pytest.mark.parametrize("scale", HUGE)
@pytest.mark.parametrize("backend", FAST)
def test_several_captions_of_an_image_at_any_scale(backend, scale):
    draw = Draw(1)
    x = torch.nn.functional.normalize(draw.normal(12, 16), dim=1)
    y = x.repeat_interleave(3, 0) + 0.05 * draw.normal(36, 16)
    y = torch.nn.functional.normalize(y, dim=1) * (1 if scale > 0 else -1)
    for margin in (0.0, 0.3):
        loss = partial(
            clip_loss, positive_ids=(torch.arange(12), torch.arange(36) // 3), margin=margin
        )
        rounded = torch.tensor(scale)
        want = run(partial(loss, backend="reference"), x.double(), y.double(), rounded.double())
        got = run(partial(loss, backend=backend), x, y, rounded)
        for name, value in want.items():
            bound = 1e-5 * value.norm() + (1e-6 * abs(scale) if name in "xy" else 1e-6)
            bound += 1e-6 * abs(scale) if name == "loss" else 0
            assert (got[name] - value).norm() <= bound, (margin, name)


@pytest.mark.parametrize("size", (1e15, 1e17, 1e18, 5e18))
@pytest.mark.parametrize("backend", ALL)
def test_no_scale_and_the_largest_features(backend, size):
    draw = Draw(0)
    x, y = (size * torch.nn.functional.normalize(draw.normal(4, 8), dim=1) for _ in range(2))
    assert clip_loss(x, y, 0.0, backend=backend).item() == pytest.approx(math.log(4))
