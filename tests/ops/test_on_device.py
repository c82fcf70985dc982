"""Every operator in every backend of a device: the CPU, or a GPU where there is one.

`make gpu` runs this on the GPU (M3BIND_TEST_DEVICE chooses otherwise); the other tests here are the
CPU's, those in tests/kernels Triton's. The truth is the reference in float64 on the CPU.
"""

import os
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from operators import DIFFERENTIABLE, LOSSES, OPERATORS, Operator, results

from m3bind import backends

DEVICE = os.environ.get("M3BIND_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Operator, backend and what it takes.
EVERY_DTYPE = [
    (name, backend, dtype)
    for name in OPERATORS for backend in backends.BACKENDS for dtype in DTYPES
    if backends.why_not(name.partition(" ")[0], backend, DEVICE, dtype) is None
]  # fmt: skip
# The first of these dtypes alone.
CASES = list({case[:2]: case for case in reversed(EVERY_DTYPE)}.values())[::-1]
# (N, D): ragged, in one tile and a bit; many tiles, by descriptors where there are such; sums so
# long that it shows how they are added; so many pairs that derivatives are rounded.
SHAPES = ((70, 33), (1000, 96), (300, 1536), (1100, 320))
# Beside 1.5 x plain PyTorch's own error, as a ratio of norms; gradients of scalars are sums that
# cancel.
TOLERANCE, SCALAR_TOLERANCE = 1e-6, 2e-5


def parametrized(listed):
    return pytest.mark.parametrize(
        ("operator", "backend", "dtype"), listed,
        ids=["-".join(map(str, case)) for case in listed],
    )  # fmt: skip


cases, every_dtype = parametrized(CASES), parametrized(EVERY_DTYPE)
differentiable_cases = parametrized([case for case in CASES if case[0] in DIFFERENTIABLE])


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def moved(leaves, device: str = DEVICE):
    return {name: t.to(device) for name, t in leaves.items()}


def on_device(owed: Operator, leaves, **more):
    return moved(results(owed, moved(leaves), **more), "cpu")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    norm = want.norm().item()
    return (got.double() - want).norm().item() / (norm if norm > 0 else 1.0)


@lru_cache(16)  # the next backend asks for the same
def truth_and_formula(operator: str, n: int, d: int, dtype: torch.dtype):
    owed = OPERATORS[operator]
    leaves = owed.make(n, d, dtype=dtype)
    given = {k: t.double() for k, t in leaves.items()}, leaves
    return tuple(results(owed, each, backend="reference") for each in given)


# On the CPU the reference is the formula itself.
@pytest.mark.parametrize(("n", "d"), SHAPES)
@parametrized([case for case in EVERY_DTYPE if (DEVICE, case[1]) != ("cpu", "reference")])
def test_error_against_float64(operator, backend, n, d, dtype):
    owed = OPERATORS[operator]
    want, plain = truth_and_formula(operator, n, d, dtype)
    for name, got in on_device(owed, owed.make(n, d, dtype=dtype), backend=backend).items():
        if not got.is_floating_point():
            assert torch.equal(got, want[name]), name
            continue
        small = SCALAR_TOLERANCE if name.startswith("logit") else TOLERANCE
        mine, theirs = error(got, want[name]), error(plain[name], want[name])
        assert mine <= 1.5 * theirs + small, (name, mine, theirs)


@(cases if DEVICE == "cpu" else every_dtype)  # test_operator_contract.py has the CPU's others
def test_bit_equal_from_run_to_run(operator, backend, dtype):
    owed = OPERATORS[operator]
    leaves = owed.make(1100, 320, dtype=dtype)
    first, second = (on_device(owed, leaves, backend=backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("n", "d"), [(70, 34), (1, 64)])  # one row may have any stride
@cases
def test_strided_inputs(operator, backend, dtype, n, d):
    owed = OPERATORS[operator]
    leaves = owed.make(n, d, dtype=dtype)

    def strided(**given):
        views = {name: given[name].T.contiguous().T for name in owed.rounded}
        return owed.call(**given | views, backend=backend)

    plain = on_device(owed, leaves, backend=backend)
    for name, got in on_device(owed, leaves, call=strided).items():
        torch.testing.assert_close(got, plain[name], rtol=1e-5, atol=3e-6)


@parametrized([case for case in CASES if case[0] in LOSSES[:3]])
def test_compile_without_graph_breaks(operator, backend, dtype):
    torch._dynamo.reset()
    owed = OPERATORS[operator]

    def step(**leaves):
        return owed.call(**leaves, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = owed.make(70, 33, dtype=dtype)
    plain = on_device(owed, leaves, call=step)
    for name, got in on_device(owed, leaves, call=compiled).items():
        torch.testing.assert_close(got, plain[name], rtol=1e-6, atol=1e-7)


@differentiable_cases
def test_nan_in_gives_nan_out(operator, backend, dtype):
    owed = OPERATORS[operator]
    leaves = owed.make(70, 33, dtype=dtype)
    leaves[owed.rounded[0]][3, 5] = torch.nan
    found = on_device(owed, leaves, backend=backend)
    assert any(t.isnan().any() for k, t in found.items() if k.startswith("output"))


@pytest.mark.skipif(DEVICE == "cpu", reason="streams are a GPU's")
@cases
def test_another_stream_than_the_default(operator, backend, dtype):
    owed = OPERATORS[operator]
    leaves = moved(owed.make(1100, 320, dtype=dtype))
    want = results(owed, leaves, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Work that is still under way on this stream: who runs on another reads too early.
        late = {k: t.clone().zero_() for k, t in leaves.items()}
        torch.cuda._sleep(20_000_000)
        for name, value in leaves.items():
            late[name].copy_(value)
        got = results(owed, late, backend=backend)
    stream.synchronize()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
