"""Contestants that take turns in one process: after one call each to warm up, rounds in which each
runs once, or twice, if that is brief, of which the second counts. A machine that changes its clock
then favours nobody.

M3BIND_BENCH_SIZES, _DTYPES, _THREADS and _SECONDS choose batches, dtypes, threads (1) and about how
long the rounds of one group last; M3BIND_BENCH_DEVICE, which `make gpu` sets, the device. On a GPU,
events on the stream tell the time. A contestant that cannot run, or fails, leaves the others alone.
"""

import importlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind import backends

DEVICE = os.environ.get("M3BIND_BENCH_DEVICE", "cpu")
THREADS = int(os.environ.get("M3BIND_BENCH_THREADS", "1"))
SECONDS = float(os.environ.get("M3BIND_BENCH_SECONDS", "10"))
LEAST_ROUNDS, MOST_ROUNDS = 3, 100
BRIEF = 0.01  # seconds
SIZES = tuple(int(n) for n in os.environ.get("M3BIND_BENCH_SIZES", "1024,4096").split(","))
FEATURES = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOSEN_DTYPES = tuple(os.environ.get("M3BIND_BENCH_DTYPES", "fp32,bf16,fp16").split(","))

Run = Callable[[], Any]


class NotRun(Exception):
    """Why a contestant does not take part on this machine."""


@dataclass(kw_only=True)
class Contestant:
    run: Run
    setting: str
    warm_up: Run | None = None  # something shorter than a whole run
    parts: tuple[Run, ...] = ()  # instead of `run`, what it does one after the other
    resting_bytes: int = 0  # of what it returns, which is no memory of the computation


@dataclass
class Taken:
    """What a contestant took, or why it took nothing."""

    setting: str = ""
    seconds: list[float] = field(default_factory=list)
    problem: str = ""
    laps: list[list[float]] = field(default_factory=list)  # of the parts of each round
    extra_mib: float | None = None  # on a GPU: at most, beyond what was there and what it returns


def peer(module: str, package: str, *, cuda: bool = False) -> ModuleType:
    if cuda and not torch.cuda.is_available():
        raise NotRun("needs CUDA")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotRun(f"{package} does not import: {error}") from error


def problem(error: Exception) -> str:
    if isinstance(error, NotRun):
        return f"not run: {error}"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:200]}"


def ours(op: str, dtype: str = "fp32") -> str:
    """The setting of m3bind where nothing is chosen."""
    return f"backend {backends.resolve(op, DEVICE, DTYPES[dtype])}"


def laps_of(parts: Sequence[Run]) -> list[float]:
    """Seconds of calls that follow each other."""
    if DEVICE == "cpu":
        marks = [time.perf_counter()]
        for part in parts:
            part()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
    events[0].record()
    for part, event in zip(parts, events[1:], strict=True):
        part()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def timed(run: Run) -> float:
    return laps_of((run,))[0]


def one_round(one: Contestant, taken: Taken) -> None:
    before = 0
    if DEVICE != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    parts = one.parts or (one.run,)
    laps = laps_of(parts)
    # Of a brief call caches decide, which hold what whoever came before has used. The call after it
    # finds its own.
    if DEVICE == "cpu" and sum(laps) < BRIEF:
        laps = laps_of(parts)
    taken.seconds.append(sum(laps))
    taken.laps.append(laps)
    if DEVICE != "cpu":
        extra = torch.cuda.max_memory_allocated() - before - one.resting_bytes
        taken.extra_mib = max(taken.extra_mib or 0.0, extra / 2**20)


def give_memory_back() -> None:
    """What a contestant took that failed for want of memory."""
    if DEVICE != "cpu":
        torch.cuda.empty_cache()


def in_turns(
    makers: Mapping[str, Callable[[], Contestant]], seconds: float = SECONDS,
    least: int = LEAST_ROUNDS,
) -> dict[str, Taken]:  # fmt: skip
    taken = {name: Taken() for name in makers}
    playing: dict[str, Contestant] = {}
    for name, make in makers.items():
        try:
            one = make()
            taken[name].setting = one.setting
            (one.warm_up or one.run)()
            playing[name] = one
        except Exception as error:
            taken[name].problem = problem(error)
            give_memory_back()
    start, rounds = time.perf_counter(), 0
    while rounds < least or (time.perf_counter() - start < seconds and rounds < MOST_ROUNDS):
        shift = rounds % max(1, len(playing))  # who comes after whom may matter to caches
        for name in [*playing][shift:] + [*playing][:shift]:
            try:
                one_round(playing[name], taken[name])
            except Exception as error:
                taken[name] = Taken(taken[name].setting, problem=problem(error))
                del playing[name]
                give_memory_back()
        rounds += 1
    return taken


def unit_rows(
    n: int, count: int, dtype: str = "fp32", seed: int = 0, d: int = FEATURES
) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    rows = (torch.randn(n, d, generator=generator, device=DEVICE) for _ in range(count))
    return [F.normalize(x, dim=1).to(DTYPES[dtype]) for x in rows]


def step(loss: Callable[..., Tensor], leaves: Iterable[Tensor], *others: Tensor) -> Run:
    """Forward and backward; what it returns are the gradients of `leaves`."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return lambda: torch.autograd.grad(loss(*leaves, *others), leaves)


def passes(loss: Callable[..., Tensor], leaves: Sequence[Tensor], *others: Tensor) -> Contestant:
    """Forward and backward as two parts, which can be timed apart; the setting is the caller's."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    kept: list[Tensor] = []

    def forward() -> None:
        kept.append(loss(*leaves, *others))

    def backward() -> tuple[Tensor, ...]:  # and nothing of the graph remains for the others' turns
        return torch.autograd.grad(kept.pop(), leaves)

    def both() -> tuple[Tensor, ...]:
        forward()
        return backward()

    return Contestant(
        run=both, setting="", parts=(forward, backward),
        resting_bytes=sum(leaf.numel() * leaf.element_size() for leaf in leaves),
    )  # fmt: skip


def fullgraph(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled for the shapes at hand: a graph of dynamic shapes is slower, and torch makes one
    (or gives up) for the later sizes of a run unless it forgets the earlier ones."""
    torch.compiler.reset()
    return torch.compile(loss, fullgraph=True, dynamic=False)
