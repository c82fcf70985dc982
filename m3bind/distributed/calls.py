"""What the three losses do alike before they meet other ranks."""

from dataclasses import dataclass
from typing import Any

from m3bind.distributed import groups, schemes
from m3bind.distributed.exchange import Channel
from m3bind.distributed.functions import Weighted
from m3bind.ops import arguments

SIZES = ("exchange", "static")


@dataclass(kw_only=True, slots=True)
class Call:
    """A rank's features, before it meets the others."""

    features: list[Any]
    channel: Channel | None  # to the others; None: the batch is in one piece
    options: dict[str, str]  # what must be the same on every rank
    error: ValueError | None

    def own(self) -> list[Any]:
        """Within `meet`, which tells an error to all ranks."""
        if self.error is not None:
            raise self.error
        return self.features


def check_options(op: str, scheme: str, sizes: str) -> None:
    arguments.choice(op, "scheme", scheme, schemes.SCHEMES)
    arguments.choice(op, "sizes", sizes, SIZES)


def checked_call(
    op: str, named: dict[str, Any], group: groups.Group, scheme: str, sizes: str
) -> Call:
    place = groups.meeting_place(named, group)
    channel = groups.channel_of(place)
    found, error = named, None
    try:
        found = groups.local(op, named, place)
    except ValueError as wrong:
        if channel is None:
            raise
        error = wrong
    if channel is None:  # over ranks `meet` does it, so that all of them raise
        check_options(op, scheme, sizes)
    sharded = found is not named
    if channel is not None and sharded:
        # What made a DTensor adds gradients up over ranks, and does not average them.
        found = {k: Weighted.apply(t, 1 / channel.size) for k, t in found.items()}
    options = {"features": "DTensors" if sharded else "tensors"}
    return Call(features=list(found.values()), channel=channel, options=options, error=error)


def given_names(optional: dict[str, Any]) -> dict[str, Any]:
    """Which of the arguments a rank passes: they lead to collectives, and must be the same."""
    return {name: "given" if value is not None else None for name, value in optional.items()}


def one_process(op: str, backend: str) -> None:
    if backend == "reference":
        raise ValueError(
            f"{op}: backend='reference' holds the whole matrix, which no rank has; choose another "
            "backend or none"
        )
