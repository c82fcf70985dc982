"""How much of what could be tried is tried: all of it on a GPU, less under Triton's interpreter."""

import os
from collections.abc import Sequence
from typing import Any

import pytest

# On a GPU no case is slow.
SLOW = (pytest.mark.slow,) if os.environ.get("TRITON_INTERPRET") == "1" else ()
# Those that an error is the worst of; the quick tests under the interpreter take fewer.
SEEDS = range(int(os.environ.get("M3BIND_TEST_SEEDS", 5)))


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=SLOW)


def crossed(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """All pairs of two lists; those are slow that it does not take for each of both to occur."""
    fast = {(i % len(first), i % len(second)) for i in range(max(len(first), len(second)))}
    return [
        (a, b) if (i, j) in fast else slow(a, b)
        for i, a in enumerate(first) for j, b in enumerate(second)
    ]  # fmt: skip
