"""Cases of two lists where each of both has to be seen, and not every pair of them every time."""

import os
from collections.abc import Sequence
from typing import Any

import pytest

# On a GPU no case is slow.
SLOW = (pytest.mark.slow,) if os.environ.get("TRITON_INTERPRET") == "1" else ()


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=SLOW)


def crossed(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """All pairs; those are slow that it does not take for each of both to occur."""
    fast = {(i % len(first), i % len(second)) for i in range(max(len(first), len(second)))}
    return [
        (a, b) if (i, j) in fast else slow(a, b)
        for i, a in enumerate(first) for j, b in enumerate(second)
    ]  # fmt: skip
