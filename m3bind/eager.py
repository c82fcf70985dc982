"""What torch.compile is to leave alone."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def eager(function: Callable[..., T]) -> Callable[..., T]:
    """Left out of what torch.compile traces. torch.compiler.disable would import the compiler."""

    disabled: list[Callable[..., T]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is not None and not disabled:
            disabled.append(dynamo.disable(function))
        return (disabled or [function])[0](*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call
