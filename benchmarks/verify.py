"""What a record of `make gpu` verifies, and why it does not verify the rest: `_verified.json`."""

import math
from dataclasses import dataclass
from typing import Any

from record import Record, Row

PRIMITIVES = {
    "clip_loss": "similarity_stats",
    "siglip_loss": "siglip",
    "similarity_distill": "similarity_distill",
    "similarity_topk": "similarity_topk",
    "similarity_rank": "similarity_rank",
}
ON_GPU = ("cuda", "triton", "chunked")
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
# An error may be this many times that of PyTorch's formula with fp32 logits, and as much more:
# ranks of near ties differ by one, whoever counts them.
TIMES = 1.5
TOLERANCE = {"similarity_rank": 1e-4}
SMALL = 1e-6


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One primitive in one backend and dtype: verified, or `reasons` why not."""

    primitive: str
    backend: str
    dtype: str
    reasons: tuple[str, ...]
    sources: str | None
    rows: tuple[Row, ...]


def tests_of(record: Record, op: str, backend: str, dtype: str) -> list[dict[str, Any]]:
    """Groups of tests that speak of this; one without a dtype speaks of all."""
    primitive, found = PRIMITIVES[op], []
    for group in record["tests"]:
        words = group["operator"].replace(",", " ").split()
        about = {PRIMITIVES.get(word, word) for word in words}
        if "similarity_lse" in about:
            about.add("similarity_stats")
        right = group["backend"] == backend and group["dtype"] in ("", DTYPES[dtype])
        if primitive in about and right:
            found.append(group)
    return found


def judge(record: Record, op: str, backend: str, dtype: str) -> Judged:
    reasons = []
    if record["mode"] != "full":
        reasons.append(f"the run was {record['mode']}, not full")
    groups = tests_of(record, op, backend, dtype)
    if not sum(g["passed"] for g in groups if g["dtype"]):
        reasons.append("no test of it passed")
    for kind in ("failed", "not finished"):
        if number := sum(group[kind] for group in groups):
            reasons.append(f"{number} tests {kind}")
    for line in record["sanitizer"]:
        right = (line["op"], line["backend"]) == (op, backend)
        # racecheck is slow, and may not come to its end; memcheck must.
        clean = line["outcome"] == "no errors"
        if right and not clean and (line["tool"] == "memcheck" or "errors" in line["outcome"]):
            reasons.append(f"{line['tool']}: {line['outcome']}")
    rows = [
        row for row in record["rows"]
        if (row["op"], row["backend"], row["dtype"]) == (op, backend, dtype)
    ]  # fmt: skip
    measured = tuple(row for row in rows if not row["problem"])
    if not measured:
        problems = {row["problem"] for row in rows} or {"no row"}
        reasons.append(f"not measured: {'; '.join(sorted(problems))}")
    failed = {row["problem"] for row in rows if row["problem"].startswith("failed")}
    reasons += sorted(failed)
    small = TOLERANCE.get(op, SMALL)
    # The same kernels with memory that saves a product have to be as right; its speed is its own.
    kept = [
        row for row in record["rows"]
        if row["backend"].startswith(f"{backend},") and (row["op"], row["dtype"]) == (op, dtype)
    ]  # fmt: skip
    # A device may lack that memory.
    reasons += sorted({row["problem"] for row in kept if row["problem"].startswith("failed")
                       and "OutOfMemory" not in row["problem"]})  # fmt: skip
    for row in (*measured, *(row for row in kept if not row["problem"])):
        error, formula = row["error"], row["reference_error"]
        if error is None or formula is None:
            reasons.append(f"no error was measured at D={row['d']}")
        elif not error <= TIMES * formula + small:  # NaN is none either
            reasons.append(f"error {error:.3g} beside {formula:.3g} at D={row['d']}")
        if row["deterministic"] is not True:
            reasons.append(f"two runs differ at D={row['d']}")
    fingerprints = {row["sources"] for row in measured}
    if measured and (len(fingerprints) > 1 or None in fingerprints):
        reasons.append("its sources changed during the run, or are unknown")
    return Judged(
        primitive=PRIMITIVES[op], backend=backend, dtype=dtype,
        reasons=tuple(dict.fromkeys(reasons)),
        sources=next(iter(fingerprints), None), rows=measured,
    )  # fmt: skip


def judged(record: Record) -> list[Judged]:
    return [
        judge(record, op, backend, dtype)
        for op in PRIMITIVES for backend in ON_GPU for dtype in DTYPES
    ]  # fmt: skip


def rate(one: Judged, sizes: set[tuple[int, int, int]]) -> float:
    """Geometric mean, TFLOP/s, of whole calls at these sizes."""
    logs = [math.log(row["tflops"]) for row in one.rows if size(row) in sizes and whole(row)]
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


def size(row: Row) -> tuple[int, int, int]:
    return row["n"], row["m"], row["d"]


def whole(row: Row) -> bool:
    """Of the operator as it is trained or searched with."""
    searches = row["op"] in ("similarity_topk", "similarity_rank")
    return row["pass"] == ("forward" if searches else "both") and row["tflops"] is not None


def verified(record: Record) -> dict[str, Any]:
    """primitive -> backend -> dtype -> what `m3bind.verified.Verified` holds."""
    good = [one for one in judged(record) if not one.reasons]
    table: dict[str, Any] = {}
    for one in good:
        rivals = [o for o in good if (o.primitive, o.dtype) == (one.primitive, one.dtype)]
        common = set.intersection(*({size(r) for r in o.rows if whole(r)} for o in rivals))
        table.setdefault(one.primitive, {}).setdefault(one.backend, {})[one.dtype] = {
            "device": record["device"], "commit": record["commit"], "date": record["date"],
            "sources": one.sources, "tflops": round(rate(one, common), 2),
        }  # fmt: skip
    return table
