"""Forward mode: how losses, and rows of results, move with features, scale and bias."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from drawn import DIRECTIONS, MASKS, POSITIVES, SEEDS, SHAPES, Draw
from feature_oracle import feature_loss
from operators import DIFFERENTIABLE, FAST, OPERATORS, counted, halves
from properties import given, settings, st
from siglip_oracle import float64_loss as siglip_truth
from test_operator_contract import derivable
from torch import Tensor

from m3bind.ops import clip_loss, siglip_loss, similarity_distill, similarity_lse, similarity_topk

jvp = torch.func.jvp


def check_total(loss: Any, truth: Any, draw: Draw, *leaves: Tensor) -> None:
    """The loss moves by the product of its float64 gradients and how the leaves move."""
    moves = tuple(draw.normal(*leaf.shape) for leaf in leaves)
    exact = tuple(leaf.double().requires_grad_() for leaf in leaves)
    total = truth(*exact) + 0 * sum(leaf.sum() for leaf in exact)
    grads = torch.autograd.grad(total, exact)
    products = [(grad * move).flatten() for grad, move in zip(grads, moves, strict=True)]
    size = 1 + sum(product.abs().sum() for product in products)
    value, moved = jvp(loss, leaves, moves)
    assert abs(value - total) <= 2e-5 * (1 + abs(total))
    assert abs(moved - sum(product.sum() for product in products)) <= 2e-6 * size


@given(
    **SHAPES, kind=st.sampled_from(POSITIVES), kinds=MASKS,
    negatives=st.sampled_from([None, (3,), (-1, 2)]), seed=SEEDS, directions=DIRECTIONS,
    label_smoothing=st.sampled_from([0.0, 0.1]), z_loss=st.sampled_from([0.0, 0.01]),
    margin=st.sampled_from([0.0, 0.2]),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("backend", FAST)
def test_clip_loss(backend, n, m, d, kind, kinds, negatives, seed, margin, **options):
    draw = Draw(seed)
    options |= draw.positives(n, m, kind) | draw.masks(n, m, kinds) | {"reduction": "sum"}
    if "soft_targets" not in options:
        options["margin"] = margin
    leaves = [draw.normal(n, d), draw.normal(m, d), torch.tensor(2.0)]
    if negatives:
        leaves.append(draw.normal(*(n if size < 0 else size for size in negatives), d))

    def with_negatives(call: Any, x: Tensor, y: Tensor, scale: Tensor, *more: Tensor) -> Tensor:
        return call(x, y, scale, **options, **({"negatives": more[0]} if more else {}))

    loss = partial(with_negatives, partial(clip_loss, backend=backend))
    check_total(loss, partial(with_negatives, feature_loss), draw, *leaves)


@given(**SHAPES, kind=st.sampled_from(POSITIVES[:3]), kinds=MASKS, seed=SEEDS)
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("backend", FAST)
def test_siglip_loss(backend, n, m, d, kind, kinds, seed):
    draw = Draw(seed)
    options = draw.positives(n, m, kind) | draw.masks(n, m, kinds) | {"reduction": "sum"}
    leaves = draw.normal(n, d), draw.normal(m, d), torch.tensor(2.0), torch.tensor(-1.0)
    loss = partial(siglip_loss, **options, backend=backend)
    check_total(loss, partial(siglip_truth, **options), draw, *leaves)


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_every_result_moves_as_its_differences_say(backend, operator):
    owed = OPERATORS[operator]
    dtype = torch.float32 if backend == "cpp" else torch.float64
    for options in owed.options:
        leaves = owed.make(5, 3, dtype=dtype)
        call, given = derivable(owed, leaves, backend=backend, **options)
        exact, _ = derivable(owed, {k: t.double() for k, t in leaves.items()}, backend="reference",
                             **options)  # fmt: skip
        given = tuple(t.detach() for t in given)
        moves = tuple(torch.linspace(-1, 1, t.numel()).to(t).view(t.shape) for t in given)
        ahead, behind = (
            exact(*(t.double() + step * m for t, m in zip(given, moves, strict=True)))
            for step in (1e-5, -1e-5)
        )
        for rate, one, other in zip(jvp(call, given, moves)[1], ahead, behind, strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 1e-8
            torch.testing.assert_close(
                rate.double(), (one - other) / 2e-5, rtol=tolerance, atol=tolerance
            )


def rows_of_distill(x: Tensor, y: Tensor, scale: Tensor, **more: Any) -> Any:
    teacher = x.detach()[:, :8], y.detach()[:, 8:]
    ids = tuple(counted(t) % 3 for t in (x, y))
    return similarity_distill(x, y, scale, *teacher, 3.0, mask_ids=ids, reduction="none", **more)


def featured(x: Tensor, y: Tensor, scale: Tensor, **more: Any) -> Any:
    masks = tuple(counted(t) % 3 for t in (x, y))
    return clip_loss(
        x, y, scale, positive_ids=halves(x, y), mask_ids=masks, label_smoothing=0.1, margin=0.3,
        z_loss=0.01, reduction="none", **more,
    )  # fmt: skip


EACH = {
    "clip_loss": clip_loss,
    "clip_loss of rows": partial(clip_loss, directions="rows"),
    "clip_loss with features": featured,
    "similarity_lse": similarity_lse,
    "siglip_loss": partial(siglip_loss, logit_bias=-1.0),
    "siglip_loss of rows": partial(siglip_loss, logit_bias=-1.0, reduction="none"),
    "similarity_distill": rows_of_distill,
}


def assert_near(got: Any, want: Any, rtol: float) -> None:
    got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
    for one, other in zip(got, want, strict=True):
        assert (one.cpu() - other).norm() <= rtol * other.norm()


def check_moves(
    loss: str, backend: str, scale: float, size: float, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Of x [40, 16] and y [50, 16], with moves of that size, against float64."""
    draw = Draw(0)
    features = [torch.nn.functional.normalize(draw.normal(n, 16), dim=1) for n in (40, 50)]
    by_scale = torch.tensor(size * (scale if abs(scale) > 1e-35 else 1.0))
    given = *(t.to(dtype) for t in features), torch.tensor(scale)
    moves = *((size * draw.normal(*t.shape)).to(dtype) for t in features), by_scale
    exact = [tuple(t.double() for t in side) for side in (given, moves)]
    want = jvp(partial(EACH[loss], backend="reference"), *exact)[1]
    there = [tuple(t.to(device) for t in side) for side in (given, moves)]
    got = jvp(partial(EACH[loss], backend=backend), *there)[1]
    assert_near(got, want, 2e-5)


@pytest.mark.parametrize("scale", (0.0, 1e-40, 1.0, -50.0, 1e10))
@pytest.mark.parametrize("loss", EACH)
@pytest.mark.parametrize("backend", FAST)
def test_scales_and_moves_of_any_size(backend, loss, scale):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (1e-4, 1.0, 1e4) if dtype == torch.float16 else (1e-4, 1.0, 1e8, 1e18):
            check_moves(loss, backend, scale, size, dtype)


def compiled(call: Any, x: Tensor, move: Tensor) -> Tensor:
    torch._dynamo.reset()
    step = torch.compile(
        lambda x, move: jvp(call, (x,), (move,))[1], fullgraph=True, backend="aot_eager"
    )
    return step(x, move)


def dual(call: Any, x: Tensor, move: Tensor) -> Tensor:
    with fwd.dual_level(), torch.no_grad():
        return fwd.unpack_dual(call(fwd.make_dual(x, move))).tangent


def whole_jacobian(call: Any, x: Tensor, move: Tensor) -> Tensor:
    return (torch.func.jacfwd(call)(x) * move).sum((-1, -2))


def many(call: Any, x: Tensor, move: Tensor) -> Tensor:
    both = torch.stack([x, x / 2]), torch.stack([move, 3 * move])
    return torch.func.vmap(lambda *each: jvp(call, each[:1], each[1:])[1])(*both)[0]


WAYS = {
    "compiled": compiled,
    "dual": dual,
    "jacfwd": whole_jacobian,
    "linearize": lambda call, x, move: torch.func.linearize(call, x)[1](move),
    "vmap of jvp": many,
    "jvp of vmap": lambda call, x, move: jvp(
        torch.func.vmap(call), (torch.stack([x, x]),), (torch.stack([move, x]),)
    )[1][0],
}


def ways() -> list[Any]:
    """Those that trace take seconds: of each kind of loss one has to wait for them."""
    kinds = ("clip_loss", "clip_loss with features", "siglip_loss of rows")
    return [
        pytest.param(loss, way, marks=pytest.mark.slow)
        if way in ("compiled", "linearize") and loss not in kinds else (loss, way)
        for loss in EACH for way in WAYS
    ]  # fmt: skip


@pytest.mark.parametrize(("loss", "way"), ways())
@pytest.mark.parametrize("backend", FAST)
def test_ways_to_ask_for_it(backend, loss, way):
    """One input moves, and the loss stands among other operations."""
    x, y, move = (Draw(seed).normal(5, 16) for seed in range(3))

    def first(x: Tensor, *, backend: str = backend) -> Tensor:
        found = EACH[loss](2 * x.sin(), y.to(x.dtype), torch.tensor(3.0, dtype=x.dtype),
                           backend=backend)  # fmt: skip
        return found[0] if isinstance(found, tuple) else found

    want = jvp(partial(first, backend="reference"), (x.double(),), (move.double(),))[1]
    torch.testing.assert_close(WAYS[way](first, x, move).double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("moving", (0, 1, 2))
@pytest.mark.parametrize("loss", EACH)
@pytest.mark.parametrize("backend", FAST)
def test_a_gradient_within_a_level_is_right_or_refused(backend, loss, moving):
    """Forward over reverse, as for the product of a Hessian and a vector: of x, y or the scale."""
    given = [Draw(0).normal(5, 16), Draw(1).normal(5, 16), torch.tensor(2.0)]
    for graph in (False, True):
        leaves = [t.clone().requires_grad_() for t in given]
        with fwd.dual_level():
            duals = list(leaves)
            duals[moving] = fwd.make_dual(leaves[moving], torch.ones_like(given[moving]))
            with pytest.raises(RuntimeError, match="fused operators have no second derivatives"):
                found = EACH[loss](*duals, backend=backend)
                found = found[0] if isinstance(found, tuple) else found
                torch.autograd.grad(found.sum(), leaves, create_graph=graph, allow_unused=True)


@pytest.mark.parametrize("compiler", ("eager", "aot_eager"))
@pytest.mark.parametrize("backend", FAST)
def test_dual_tensors_made_in_a_compiled_function(backend, compiler):
    """One compiler leaves tangents to torch, the other traces them. Calls outside are as before."""
    x, y, move = (Draw(seed).normal(5, 16) for seed in range(3))

    def moved(x: Tensor, move: Tensor, backend: str = backend) -> tuple[Tensor, ...]:
        with fwd.dual_level():
            dual = fwd.make_dual(2 * x.sin(), 2 * x.cos() * move)
            found = (
                clip_loss(dual, y, 2.0, backend=backend) + dual.square().mean(),
                siglip_loss(dual, y, 2.0, -1.0, backend=backend),
                similarity_lse(y, dual, 2.0, backend=backend)[1],
                clip_loss(y, y, 2.0, backend=backend),
            )
            *moves, nothing = (fwd.unpack_dual(each).tangent for each in found)
            assert nothing is None
            return tuple(moves)

    torch._dynamo.reset()
    want = moved(x, move, "reference")
    for call in (torch.compile(moved, fullgraph=True, backend=compiler), moved):
        torch.testing.assert_close(call(x, move), want)


@pytest.mark.parametrize("backend", FAST)
def test_dual_tensors_given_to_a_compiled_function(backend):
    x, y, move = (Draw(seed).normal(5, 16) for seed in range(3))

    def loss(x: Tensor, backend: str = backend) -> Tensor:
        return clip_loss(x, y, 2.0, backend=backend) + x.square().mean()

    step = torch.compile(loss, backend="aot_eager")
    with fwd.dual_level():
        got = fwd.unpack_dual(step(fwd.make_dual(x, move))).tangent
    torch.testing.assert_close(got, jvp(partial(loss, backend="reference"), (x,), (move,))[1])


@pytest.mark.parametrize("backend", FAST)
def test_nothing_moves_where_it_is_off(backend):
    x, y = (Draw(seed).normal(5, 3) for seed in range(2))
    with fwd.dual_level(), fwd._set_fwd_grad_enabled(False):
        moved = fwd.make_dual(x, y)
        for found in (
            clip_loss(moved, y, 1.0, backend=backend),
            similarity_topk(moved, y, 2, backend=backend)[0],
        ):
            assert fwd.unpack_dual(found).tangent is None


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused(operator):
    """And never 0 without a word."""
    owed = OPERATORS[operator]
    leaves = owed.make(5, 3, dtype=torch.float64)
    x, *others = (leaves[name] for name in owed.differentiable)
    calls = {b: derivable(owed, leaves, backend=b)[0] for b in ("reference", "chunked")}

    def total(x: Tensor, backend: str) -> Tensor:
        return sum((t**2).sum() for t in calls[backend](x, *others))

    def by_forward(f: Any) -> Any:
        return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]

    def by_backward(f: Any) -> Any:
        return torch.func.grad(lambda x: f(x).sum())

    for outer, inner in ((by_forward, by_backward), (by_backward, by_forward)):
        second = {b: outer(inner(partial(total, backend=b))) for b in calls}
        try:
            found = second["chunked"](x)
        except RuntimeError as error:
            assert "pass backend='reference' for them" in str(error)
        else:
            assert operator == "similarity_topk"
            torch.testing.assert_close(found, second["reference"](x))
