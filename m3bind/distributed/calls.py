"""What the three losses do alike before they meet other ranks."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from m3bind.distributed import groups
from m3bind.distributed.exchange import Channel
from m3bind.distributed.functions import Weighted
from m3bind.distributed.ranks import check_options

T = TypeVar("T")


def checked_call(
    op: str, features: dict[str, Any], group: groups.Group, scheme: str, sizes: str
) -> tuple[list[Any], Channel | None]:
    """This rank's features, and the channel to the others; None: the batch is in one piece."""
    found, group = groups.local(op, features, group)
    channel = groups.channel_of(group)
    if channel is None:  # over ranks `meet` does it, so that all of them raise
        check_options(op, scheme, sizes)
    if channel is not None and found is not features:
        # What made a DTensor adds gradients up over ranks, and does not average them.
        found = {k: Weighted.apply(t, 1 / channel.size) for k, t in found.items()}
    return list(found.values()), channel


def given_names(optional: dict[str, Any]) -> dict[str, Any]:
    """Which of the arguments a rank passes: they lead to collectives, and must be the same."""
    return {name: "given" if value is not None else None for name, value in optional.items()}


def one_process(op: str, backend: str) -> None:
    if backend == "reference":
        raise ValueError(
            f"{op}: backend='reference' holds the whole matrix, which no rank has; choose another "
            "backend or none"
        )


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
