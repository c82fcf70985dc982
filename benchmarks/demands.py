"""What is demanded of the operators on a CPU: the overview of `make bench`, line by line.

A bound is a demand, never a measurement; None: shown, but nothing is demanded.
"""

from dataclasses import dataclass, field
from typing import Any

KEPT = "m3bind, dot products kept"


@dataclass(frozen=True, kw_only=True)
class Demand:
    """A value of the row `of`, or its ratio to that of the row `over`, among rows with `facts`."""

    what: str
    of: str
    over: str | None = None
    value: str = "min_ms"
    unit: str = "x"
    facts: dict[str, Any] = field(default_factory=dict)
    at_most: float | None = None
    at_least: float | None = None


# (dtype, N): at most this times the floor; at least this much faster than eager, torch.compile.
KEPT_FLOOR = 0.85  # the same with all dot products kept, fp32
CLIP = {
    ("fp32", 4096): (1.10, 2.0, 1.1),
    ("fp32", 8192): (1.10, 2.0, 1.1),
    ("bf16", 4096): (1.4, 4.0, 2.0),
    ("bf16", 8192): (1.15, 4.0, 2.0),
}
SIGLIP = {4096: 1.10, 8192: 1.10}  # N: at most this times the floor
# (contestant, dtype): at most this extra memory in MiB, N=8192.
MEMORY = {("m3bind", "fp32"): 100, ("m3bind", "bf16"): 150, ("open_clip", "fp32"): None}
# (dtype, N): at least this much faster than eager.
SMALL = {(dtype, n): 1.0 for n in (48, 256, 1024) for dtype in ("fp32", "bf16", "fp16")}
TWO_THREADS = {"fp32": 1.8, "bf16": 1.8}  # dtype: at least this much faster than one, N=8192
LARGE_MIB, LARGE_FLOOR = 1.5 * 1024, 1.1  # N=65,536: of the whole process; times the floor
DISTRIBUTED, DISTRIBUTED_MEMORY = 1.0, 3.0  # at least this much faster, less memory
TOPK = 1.0  # at least this much faster than faiss's flat index
# Times the error of the formula with fp32 logits; of eager autocast, which rounds its logits.
ERROR_FORMULA, ERROR_EAGER = 1.5, 0.6


def _clip() -> list[Demand]:
    found = []
    for (dtype, n), (floor, eager, compiled) in CLIP.items():
        facts = {"op": "clip_loss", "kind": "time", "dtype": dtype, "n": n}
        name = f"clip_loss {dtype}, N={n}"
        policy = "eager" if dtype == "fp32" else "eager autocast"
        found += [
            Demand(what=f"{name}: time over that of the four bare GEMMs", of="m3bind",
                   over="floor", facts=facts, at_most=floor),
            *([Demand(what=f"{name}: the same with all dot products kept", of=KEPT,
                      over="floor", facts=facts, at_most=KEPT_FLOOR)] if dtype == "fp32" else []),
            Demand(what=f"{name}: faster than open_clip {policy}", of="open_clip",
                   over="m3bind", facts=facts, at_least=eager),
            Demand(what=f"{name}: faster than torch.compile", of="torch.compile",
                   over="m3bind", facts=facts, at_least=compiled),
        ]  # fmt: skip
    return found


def _siglip() -> list[Demand]:
    return [
        Demand(what=f"siglip_loss fp32, N={n}: time over that of the three bare GEMMs",
               of="m3bind", over="floor", at_most=bound,
               facts={"op": "siglip_loss", "kind": "time", "dtype": "fp32", "n": n})
        for n, bound in SIGLIP.items()
    ]  # fmt: skip


def _memory() -> list[Demand]:
    return [
        Demand(what=f"clip_loss {dtype}, N=8192: extra memory, cold, {name}", of=name,
               value="extra_mib", unit=" MiB", at_most=bound,
               facts={"op": "clip_loss", "kind": "memory", "dtype": dtype, "n": 8192})
        for (name, dtype), bound in MEMORY.items()
    ]  # fmt: skip


def _small() -> list[Demand]:
    return [
        Demand(what=f"{op} {dtype}, N={n}: faster than open_clip eager, same dtype policy",
               of="open_clip", over="m3bind", at_least=bound,
               facts={"op": op, "kind": "time", "dtype": dtype, "n": n})
        for op in ("clip_loss", "siglip_loss")
        for (dtype, n), bound in SMALL.items()
    ]  # fmt: skip


def _threads() -> list[Demand]:
    return [
        Demand(what=f"clip_loss {dtype}, N=8192: two threads faster than one", of="1 thread",
               over="2 threads", at_least=bound,
               facts={"op": "clip_loss", "kind": "threads", "dtype": dtype, "n": 8192})
        for dtype, bound in TWO_THREADS.items()
    ]  # fmt: skip


def _large() -> list[Demand]:
    facts = {"op": "clip_loss", "kind": "memory", "dtype": "fp32", "n": 65536}
    name = "clip_loss fp32, N=65,536, two threads, one round"
    return [
        Demand(what=f"{name}: memory of the whole process", of="m3bind", value="peak_mib",
               unit=" MiB", facts=facts, at_most=LARGE_MIB),
        Demand(what=f"{name}: of it beyond libraries, features and gradients", of="m3bind",
               value="extra_mib", unit=" MiB", facts=facts),
        Demand(what=f"{name}: time over that of the four bare GEMMs", of="m3bind", over="floor",
               facts=facts, at_most=LARGE_FLOOR),
    ]  # fmt: skip


def _distributed() -> list[Demand]:
    facts = {"op": "clip_loss", "dtype": "fp32", "n": 4096, "ranks": 2}
    name = "clip_loss fp32 over 2 ranks, 4096 rows each"
    return [
        Demand(what=f"{name}: faster than open_clip (local_loss, gather_with_grad)",
               of="open_clip", over="m3bind", facts=facts | {"kind": "over ranks"},
               at_least=DISTRIBUTED),
        Demand(what=f"{name}: less memory a rank", of="open_clip", over="m3bind",
               value="extra_mib", facts=facts | {"kind": "memory over ranks"},
               at_least=DISTRIBUTED_MEMORY),
    ]  # fmt: skip


def _topk() -> list[Demand]:
    facts = {"op": "similarity_topk", "dtype": "fp32", "n": 4096, "num_rows": 1_000_000}
    return [
        Demand(what="similarity_topk fp32, 4096 x 1,000,000, k=10: faster than faiss's flat index",
               of="faiss flat", over="m3bind", facts=facts, at_least=TOPK)
    ]  # fmt: skip


def _errors() -> list[Demand]:
    found = []
    for dtype in ("fp32", "bf16", "fp16"):
        facts = {"op": "clip_loss", "kind": "error", "dtype": dtype}
        name = f"clip_loss {dtype}: gradient error over that of"
        found.append(
            Demand(what=f"{name} the formula with fp32 logits", of="m3bind", over="fp32 logits",
                   value="gradient_error", facts=facts, at_most=ERROR_FORMULA)
        )  # fmt: skip
        if dtype != "fp32":
            found.append(
                Demand(what=f"{name} open_clip eager autocast, scale 100", of="m3bind",
                       over="open_clip", value="gradient_error", facts=facts, at_most=ERROR_EAGER)
            )  # fmt: skip
    return found


DEMANDS = [
    *_clip(), *_siglip(), *_memory(), *_small(), *_threads(), *_large(), *_distributed(),
    *_topk(), *_errors(),
]  # fmt: skip
