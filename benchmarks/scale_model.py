"""What a loss over W ranks costs each of them: seconds, bytes and memory, from a few rates.

One step is the forward and the backward pass of the loss alone, of B rows and columns in all,
b = B / W on each rank, D features of s bytes.

    compute      matrix products of 2 * b * B * D operations each, at the measured rate, with no dot
                 products kept, and so many passes of exponentials over b * B pairs, at the rate
                 that one rank's loss shows
    gather       y has arrived before the forward pass, x while it runs; gradients do not travel
    circulate    W steps; in each the next block, and in the backward pass a gradient in float32,
                 travels while one is computed on: a step takes as long as the longer of the two
    small        the seconds of a call with nothing to do, and a latency for each exchange of sizes
                 or statistics, and for each block that travels

Left out: statistics' bytes (88 a row and column), the backend's own buffers, stragglers, and
whether links are shared or differ; sends and computation are taken not to slow each other.
"""

from dataclasses import dataclass
from typing import Any

FEATURES = 512  # of what is recorded
STATISTICS_BYTES = 88  # a row or column, at most
SMALL_CALLS = 6


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one rank, while all ranks do the same."""

    flops: float  # operations a second, of matrix products
    pairs: float  # pairs a second and pass, of what is done to a logit beside
    link: float  # bytes a second that it sends
    latency: float  # seconds of a small collective
    call: float  # seconds of one rank's step of one row


@dataclass(frozen=True, kw_only=True)
class Cost:
    seconds: float
    compute: float  # seconds of it, if nothing had to travel
    sent: int  # bytes
    memory: int  # bytes beyond features and their gradients


# matrix products and passes over pairs, forward and backward
WORK = {
    ("clip_loss", "one rank"): ((1, 1), (3, 1)),
    ("clip_loss", "gather"): ((1, 1), (4, 2)),
    ("clip_loss", "circulate"): ((1, 1), (3, 1)),
    ("siglip_loss", "one rank"): ((3, 1), (0, 0)),
    ("siglip_loss", "gather"): ((4, 2), (0, 0)),
    ("siglip_loss", "circulate"): ((3, 1), (0, 0)),
}


def predict(loss: str, scheme: str, B: int, W: int, D: int, size: int, rates: Rates) -> Cost:
    """Of one step; `size` in bytes of an element."""
    b = B / W
    scheme = scheme if W > 1 else "one rank"
    forward, backward = (
        products * 2 * b * B * D / rates.flops + passes * b * B / rates.pairs
        for products, passes in WORK[loss, scheme]
    )
    compute, features = forward + backward, b * D * size
    if scheme == "one rank":
        seconds = compute + rates.call
        return Cost(seconds=seconds, compute=compute, sent=0, memory=STATISTICS_BYTES * B)
    small = rates.call + SMALL_CALLS * rates.latency
    if scheme == "gather":
        one_side = (W - 1) * features
        seconds = one_side / rates.link + max(forward, one_side / rates.link) + backward + small
        sent, held = 2 * one_side, 2 * B * D * size
    else:
        gradient = b * D * 4
        trips = 1 if loss == "siglip_loss" else 2
        ahead = max(forward / W, features / rates.link) * (W - 1) + forward / W
        back = max(backward / W, (features + gradient) / rates.link) * W
        if trips == 1:  # the gradient is known in the only pass
            ahead, back = max(forward / W, (features + gradient) / rates.link) * W, 0.0
        seconds = ahead + back + small + (trips * (W - 1) + W) * rates.latency
        sent = trips * (W - 1) * features + W * gradient
        held = 2 * features + 3 * gradient
    return Cost(
        seconds=seconds, compute=compute, sent=round(sent),
        memory=round(held + STATISTICS_BYTES * (B if scheme == "gather" else 2 * b)),
    )  # fmt: skip


def alone(record: dict[str, Any], dtype: str, loss: str) -> tuple[float, float]:
    """Of one rank: the seconds of a call, and pairs a second and pass, out of what its step takes
    at the smallest batch beside its matrix products."""
    one = record["runs"][0]
    steps = [s for s in one["steps"] if (s["dtype"], s["loss"]) == (dtype, loss)]
    nothing, smallest, *_ = sorted(steps, key=lambda s: s["B"])
    forward, backward = WORK[loss, "one rank"]
    products, passes = forward[0] + backward[0], forward[1] + backward[1]
    pairs = smallest["B"] ** 2
    rest = smallest["seconds"] - nothing["seconds"]
    rest -= products * 2 * pairs * FEATURES / one["rates"][dtype]["flops"]
    # Our products may be faster than the library's: then nothing is seen of the rest.
    return nothing["seconds"], passes * pairs / max(rest, 1e-12)


def rates_of(record: dict[str, Any], W: int, dtype: str, loss: str) -> Rates:
    """Exponentials slow down with matrix products where ranks share cores."""
    one, here = (next(r for r in record["runs"] if r["W"] == w) for w in (1, W))
    own, single = here["rates"][dtype], one["rates"][dtype]
    call, pairs = alone(record, dtype, loss)
    shared = own["flops"] / single["flops"]
    return Rates(
        flops=own["flops"], pairs=pairs * shared, link=own["link"], latency=own["latency"],
        call=call / shared,
    )  # fmt: skip
