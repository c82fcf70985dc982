"""Contestants that take turns in one process: after one call each to warm up, rounds in which each
runs once. A machine that changes its clock then favours nobody.

M3BIND_BENCH_SIZES, _DTYPES, _THREADS and _SECONDS choose batches, dtypes, threads (1) and about how
long the rounds of one group last. A contestant that cannot run, or fails, leaves the others alone.
"""

import importlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3bind import backends

THREADS = int(os.environ.get("M3BIND_BENCH_THREADS", "1"))
SECONDS = float(os.environ.get("M3BIND_BENCH_SECONDS", "10"))
LEAST_ROUNDS, MOST_ROUNDS = 3, 100
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


@dataclass
class Taken:
    """What a contestant took, or why it took nothing."""

    setting: str = ""
    seconds: list[float] = field(default_factory=list)
    problem: str = ""


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
    return f"backend {backends.resolve(op, 'cpu', DTYPES[dtype])}"


def timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


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
    start, rounds = time.perf_counter(), 0
    while rounds < least or (time.perf_counter() - start < seconds and rounds < MOST_ROUNDS):
        shift = rounds % max(1, len(playing))  # who comes after whom may matter to caches
        for name in [*playing][shift:] + [*playing][:shift]:
            try:
                taken[name].seconds.append(timed(playing[name].run))
            except Exception as error:
                taken[name] = Taken(taken[name].setting, problem=problem(error))
                del playing[name]
        rounds += 1
    return taken


def unit_rows(n: int, count: int, dtype: str = "fp32", seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(n, FEATURES, generator=generator) for _ in range(count))
    return [F.normalize(x, dim=1).to(DTYPES[dtype]) for x in rows]


def step(loss: Callable[..., Tensor], leaves: Iterable[Tensor], *others: Tensor) -> Run:
    """Forward and backward; what it returns are the gradients of `leaves`."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return lambda: torch.autograd.grad(loss(*leaves, *others), leaves)


def fullgraph(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled for the shapes at hand: a graph of dynamic shapes is slower, and torch makes one
    (or gives up) for the later sizes of a run unless it forgets the earlier ones."""
    torch.compiler.reset()
    return torch.compile(loss, fullgraph=True, dynamic=False)
