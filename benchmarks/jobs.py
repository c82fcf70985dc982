"""What `make gpu` measures of each operator: its inputs, its peers at their best settings, the work
that nobody can do without, and the sizes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import bench_distill
import bench_siglip
import bench_topk
import torch
from clip_contestants import PEERS, SCALE
from torch import Tensor
from turns import DEVICE, unit_rows

from m3bind import ops

K = 32
Inputs = tuple[list[Tensor], list[Tensor]]  # with a gradient; without
Loss = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """`call(*leaves, *others, backend=...)`. `units` are the GEMMs of a pass at least, None where
    it has no floor of its own; `floor` the arguments of the bare loop of them."""

    call: Loss
    inputs: Callable[..., Inputs]  # of n, m, d, dtype, seed
    units: dict[str, int | None]
    peers: dict[str, tuple[Callable[[], Loss], str]] = field(default_factory=dict)
    floor: dict[str, int] | None = None
    gallery: bool = False  # columns are the plan's gallery, not as many as rows
    kept: dict[str, Any] = field(default_factory=dict)  # arguments: memory that saves a product
    autocast: bool = True  # peers train under it in 16 bit
    # The error may be 1.5 x that of PyTorch's formula with fp32 logits, and this.
    tolerance: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Plan:
    cases: tuple[tuple[str, int, int], ...]  # dtype, rows, features: the most wanted first
    seconds: float  # of the rounds of one case
    error_rows: int  # float64 holds the whole matrix, so errors are of fewer rows
    seeds: int
    gallery: int
    large: int = 0  # rows of the one case that nobody can hold
    compiles: bool = True


def _cases(dtypes: tuple[str, ...], sizes: tuple[tuple[int, int], ...]):
    return tuple((dtype, n, d) for dtype in dtypes for n, d in sizes)


PLANS = {
    "full": Plan(
        cases=_cases(
            ("bf16", "fp32"),
            ((8192, 512), (32768, 512), (32768, 768), (65536, 768), (65536, 512), (32768, 1024),
             (65536, 1024), (8192, 768), (8192, 1024)),
        ) + _cases(("fp16",), ((8192, 512),)),
        # More pairs than a wave of derivatives holds.
        seconds=0.4, error_rows=12288, seeds=3, gallery=1 << 20, large=1 << 20,
    ),
    "quick": Plan(
        cases=_cases(("bf16", "fp32"), ((8192, 512),)), seconds=0.2, error_rows=1024, seeds=1,
        gallery=1 << 16,
    ),
    # To test all of it where there is no GPU: the figures say nothing.
    "cpu": Plan(
        cases=_cases(("bf16", "fp32"), ((96, 32),)), seconds=0.01, error_rows=64, seeds=1,
        gallery=256, large=192, compiles=False,
    ),
}  # fmt: skip


def pairs(n: int, m: int, d: int, dtype: str, seed: int, *scalars: float) -> Inputs:
    numbers = [torch.tensor(value, device=DEVICE) for value in scalars]
    return [*unit_rows(n, 2, dtype, seed, d), *numbers], []


def taught(n: int, m: int, d: int, dtype: str, seed: int) -> Inputs:
    x, y, *teacher = unit_rows(n, 4, dtype, seed, d)
    scales = [torch.tensor(s, device=DEVICE) for s in (bench_distill.SCALE,
              bench_distill.TEACHER_SCALE)]  # fmt: skip
    return [x, y, scales[0]], [*teacher, scales[1]]


def searched(n: int, m: int, d: int, dtype: str, seed: int) -> Inputs:
    (queries,), (gallery,) = (unit_rows(rows, 1, dtype, seed + i, d)
                              for i, rows in ((0, n), (1000, m)))  # fmt: skip
    return [], [queries, gallery]


def compiled(make: Callable[[], Loss]) -> Callable[[], Loss]:
    def made() -> Loss:
        torch.compiler.reset()
        return torch.compile(make(), dynamic=False)

    return made


def eager_and_compiled(make: Callable[[], Loss]) -> dict[str, tuple[Callable[[], Loss], str]]:
    return {
        "open_clip": (make, "eager"),
        "open_clip compiled": (compiled(make), "torch.compile, static shapes"),
    }


def rank(queries: Tensor, gallery: Tensor, **chosen: Any) -> Tensor:
    own = torch.arange(len(queries), device=queries.device)
    return ops.similarity_rank(queries, gallery, own, **chosen)


JOBS = {
    "clip_loss": Job(
        call=ops.clip_loss,
        inputs=lambda *size: pairs(*size, SCALE),
        units={"forward": 1, "backward": 3, "both": 4},
        floor={"logits": 2},
        kept={"memory_budget": math.inf},
        peers=eager_and_compiled(PEERS["open_clip"][0])
        | {name: PEERS[name] for name in ("checkpointed panels", "inf-cl", "cut-cross-entropy")},
    ),
    # The gradient may be formed in the forward pass: only both together have a floor.
    "siglip_loss": Job(
        call=ops.siglip_loss,
        inputs=lambda *size: pairs(*size, bench_siglip.SCALE, bench_siglip.BIAS),
        units={"forward": None, "backward": None, "both": 3},
        floor={"logits": 1},
        peers=eager_and_compiled(bench_siglip.PEERS["open_clip"][0])
        | {"checkpointed panels": bench_siglip.PEERS["checkpointed panels"]},
    ),
    "similarity_distill": Job(
        call=partial(ops.similarity_distill, kind="ce"),
        inputs=taught,
        units={"forward": 2, "backward": 4, "both": 6},
        floor={"logits": 2, "teacher": 1},
        peers=eager_and_compiled(bench_distill.open_clip_loss),
    ),
    "similarity_topk": Job(
        call=lambda queries, gallery, **chosen: ops.similarity_topk(queries, gallery, K, **chosen),
        inputs=searched,
        units={"forward": 1},
        gallery=True,
        autocast=False,
        peers={
            "torch panels": (
                lambda: lambda queries, gallery: bench_topk.torch_panels(queries, gallery, K),
                f"matmul and topk, panels of {bench_topk.PANEL_COLUMNS}",
            )
        },
    ),
    # Ranks of near ties may differ by one, whoever counts them.
    "similarity_rank": Job(
        call=rank, inputs=searched, units={"forward": 1}, autocast=False, tolerance=1e-4,
    ),
}  # fmt: skip
