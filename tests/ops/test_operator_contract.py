"""What every operator owes torch: schema, fake, autograd, compile, autocast, strides, threads."""

import pytest
import torch
from clip_oracle import needs_native
from operators import (
    ALL,
    DIFFERENTIABLE,
    FAST,
    OPCHECKS,
    OPERATORS,
    opchecks,
    results,
)


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("operator", OPCHECKS)
@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend, operator):
    for op, arguments in opchecks(operator, backend):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", ("reference", "chunked"))
def test_gradcheck_in_float64(backend, operator):
    owed = OPERATORS[operator]
    leaves = owed.make(6, 4, dtype=torch.float64)
    for options in owed.options:
        assert torch.autograd.gradcheck(*derivable(owed, leaves, backend=backend, **options))


def derivable(operator, leaves, **more):
    """A function of the differentiable leaves alone, and these."""
    names = operator.differentiable

    def call(*given):
        found = operator.outputs(leaves | dict(zip(names, given, strict=True)), **more)
        return tuple(t for t in found if t.is_floating_point())

    return call, tuple(leaves[name].clone().requires_grad_() for name in names)


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_gradgradcheck_of_the_reference_and_refusal_of_the_fused(operator):
    owed = OPERATORS[operator]
    leaves = owed.make(5, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(*derivable(owed, leaves, backend="reference"))
    call, given = derivable(owed, leaves, backend="chunked")
    (grad,) = torch.autograd.grad(sum(t.sum() for t in call(*given)), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="fused operators have no second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", FAST)
def test_transforms_of_torch_func(backend, operator):
    """Gradients, of many at once, and of an operator over many; a second one is refused."""
    owed = OPERATORS[operator]
    found = []
    for dtype, chosen in ((torch.float64, "reference"), (torch.float32, backend)):
        call, given = derivable(owed, owed.make(5, 3, dtype=dtype), backend=chosen)

        def total(*inputs, call=call):
            return sum(t.sum() for t in call(*inputs))

        def many(*inputs, total=total):
            return torch.func.vmap(total)(*(torch.stack([t, t / 2]) for t in inputs)).sum()

        given = tuple(t.detach() for t in given)
        every = tuple(range(len(given)))
        grad = torch.func.grad(total, every)
        halves = tuple(torch.stack([t, t / 2]) for t in given)
        found.append(
            (
                *grad(*given),
                *torch.func.vmap(grad)(*halves),
                *torch.func.grad(many, every)(*given),
                *torch.func.jacrev(total, every)(*given),
            )
        )
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="fused operators have no second derivatives"):
        torch.func.grad(lambda *t: sum(g.sum() for g in grad(*t)))(*given)


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_compiled_autograd_of_an_eager_forward(operator):
    owed = OPERATORS[operator]
    call, given = derivable(owed, owed.make(5, 3, dtype=torch.float64), backend="chunked")
    want = torch.autograd.grad(sum(t.sum() for t in call(*given)), given)
    total = sum(t.sum() for t in call(*given))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        total.backward()
    for leaf, grad in zip(given, want, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


# What is plain PyTorch compiles wherever the others do.
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", (*FAST, pytest.param("reference", marks=pytest.mark.slow)))
def test_compile_without_graph_breaks(backend, operator):
    torch._dynamo.reset()
    owed = OPERATORS[operator]

    # clip_loss sees autocast and a new shape under inductor, below, and the losses "of" some
    # directions differ from the others in the values alone.
    once = operator == "clip_loss" or " of " in operator
    sizes, autocast = ((20,), False) if once else ((20, 30), True)

    def step(**leaves):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return owed.call(**leaves, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in sizes:
        leaves = owed.make(n)
        assert_same(results(owed, leaves, compiled), results(owed, leaves, step))
    with torch.no_grad():
        torch.testing.assert_close(compiled(**leaves), step(**leaves))


# A compiler of C++ is started for each; the others see the same without inductor, above.
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("siglip_loss", "similarity_distill")]


@needs_native
@pytest.mark.parametrize("operator", ("clip_loss", *SLOW))
def test_compile_with_inductor_autocast_and_a_new_shape(operator):
    torch._dynamo.reset()
    owed = OPERATORS[operator]

    def step(**leaves):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return owed.call(**leaves, **owed.options[-1])

    compiled = torch.compile(step, fullgraph=True)
    for n in (20, 33):
        # Values that bfloat16 holds exactly, and gradients to its rounding: inductor leaves out the
        # rounding of a cast to and fro.
        leaves = {k: t.float() for k, t in owed.make(n, dtype=torch.bfloat16).items()}
        want, got = results(owed, leaves, step), results(owed, leaves, compiled)
        for name, value in want.items():
            rtol = 1e-6 if name.startswith("output") else 1e-2 if name in owed.rounded else 1e-5
            torch.testing.assert_close(got[name], value, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ALL)
def test_autocast_rounds_the_features_and_no_scalar(backend, operator):
    owed = OPERATORS[operator]
    leaves = owed.make(40, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = owed.outputs(leaves, backend=backend)
    rounded = leaves | {name: leaves[name].bfloat16() for name in owed.rounded}
    plain = owed.outputs(leaves, backend=backend)
    for value, want, exact in zip(got, owed.outputs(rounded, backend=backend), plain, strict=True):
        assert value.dtype == want.dtype == exact.dtype and torch.equal(value, want)
        if value.is_floating_point():
            assert value.dtype == torch.float32 and not torch.equal(value, exact)


LAYOUTS = {
    "columns first": lambda t: t.T.contiguous().T,
    "gaps": lambda t: torch.stack([t, t.detach()], 2)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", FAST)
def test_strided_inputs(backend, operator, layout):
    owed = OPERATORS[operator]
    leaves = owed.make(24, 10)

    def strided(**given):  # within, as fresh leaves are contiguous
        views = {name: LAYOUTS[layout](given[name]) for name in owed.rounded}
        assert not any(view.is_contiguous() for view in views.values())
        return owed.call(**given | views, backend=backend)

    plain = results(owed, leaves, backend=backend)
    assert_same(results(owed, leaves, strided), plain, rtol=owed.rtol, atol=owed.atol)


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", FAST)
def test_strided_upstream_gradients_and_a_second_backward(backend, operator):
    call, given = derivable(OPERATORS[operator], OPERATORS[operator].make(24, 10), backend=backend)
    for output in call(*given):
        ones = torch.ones_like(output)
        grads = [
            torch.autograd.grad(output, given[0], upstream, retain_graph=True)[0]
            for upstream in (
                ones,
                torch.ones(()).expand_as(ones),
                torch.stack([ones] * 2, -1)[..., 0],
            )
        ]
        assert grads[0].any()
        assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", FAST)
def test_only_the_wanted_gradients(backend, operator):
    owed = OPERATORS[operator]
    leaves = owed.make(24, 10)
    everything = results(owed, leaves, backend=backend)
    for wanted in owed.differentiable:
        given = leaves | {wanted: leaves[wanted].clone().requires_grad_()}
        outputs = [t for t in owed.outputs(given, backend=backend) if t.requires_grad]
        weights = [torch.linspace(1, 2, t.numel()).view(t.shape) for t in outputs]
        torch.autograd.backward(outputs, weights)
        torch.testing.assert_close(given[wanted].grad, everything[wanted], rtol=1e-5, atol=1e-8)


# The last: more threads than blocks of rows.
ANY_THREADS, SAME_THREADS = (1, 1, 2, 3, 25), (2, 2, 2)


@needs_native
@pytest.mark.parametrize(
    ("dtype", "d"), [(torch.float32, 64), (torch.float32, 201), (torch.bfloat16, 201)], ids=str
)
@pytest.mark.parametrize("n", (100, 1501), ids=("two tiles", "tiles of two heights"))
@pytest.mark.parametrize("operator", OPERATORS)
def test_bit_equal_from_run_to_run_and_for_any_threads(operator, n, dtype, d):
    from m3bind import _C

    # Elsewhere products are GEMMs of torch's BLAS, which for ragged sizes may themselves depend on
    # the number of threads.
    blocked = _C.cpu_capability.startswith("avx512")
    runs = ANY_THREADS if blocked else SAME_THREADS
    owed = OPERATORS[operator]
    leaves = owed.make(n, d, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in runs:
            torch.set_num_threads(threads)
            found.append(results(owed, leaves, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, found[0], rtol=0, atol=0, equal_nan=False)
