"""Who plays in a row of `make gpu`: ours by backend, peers, and the bare GEMMs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from clip_contestants import autocast
from floor import gemm_floor
from jobs import Job
from turns import DEVICE, DTYPES, Contestant, NotRun, passes

from m3bind import backends

OURS = ("cpp", "chunked") if DEVICE == "cpu" else ("cuda", "triton", "chunked")
FLOOR = "bare GEMMs"
# Ours again, with memory for what the backward pass would form again.
KEPT = ", kept"


def is_ours(name: str) -> bool:
    return backend_of(name) in OURS


def backend_of(name: str) -> str:
    return name.removesuffix(KEPT)


def names_of(job: Job) -> Iterator[str]:
    yield from own_names(job)
    yield from job.peers
    if job.floor is not None:
        yield FLOOR


def own_names(job: Job) -> Iterator[str]:
    for backend in OURS:
        yield backend
        if job.kept and backend != "chunked":
            yield backend + KEPT


def _our_call(job: Job, op: str, name: str, dtype: str) -> Callable[..., Any]:
    backend = backend_of(name)
    reason = backends.why_not(op, backend, DEVICE, DTYPES[dtype])
    if reason is not None:
        raise NotRun(reason)
    return partial(job.call, backend=backend, **(job.kept if name.endswith(KEPT) else {}))


def _peer_call(job: Job, name: str, dtype: str) -> Callable[..., Any]:
    make, _ = job.peers[name]
    return autocast(make(), DTYPES[dtype]) if job.autocast and dtype != "fp32" else make()


def call_of(job: Job, op: str, name: str, dtype: str) -> Callable[..., Any]:
    return _our_call(job, op, name, dtype) if is_ours(name) else _peer_call(job, name, dtype)


def _setting_of(job: Job, name: str, dtype: str) -> str:
    if is_ours(name):
        given = [f"{key}={value}" for key, value in job.kept.items() if name.endswith(KEPT)]
        given += ["TFLOP/s of the products without it"] if given else []
        return ", ".join([f"{dtype} features", "fp32 logits", *given])
    how = job.peers[name][1]
    return f"{how}, autocast {dtype}" if job.autocast and dtype != "fp32" else f"{how}, {dtype}"


def contestant(job: Job, op: str, name: str, inputs: Any, n: int, d: int, dtype: str) -> Contestant:
    if name == FLOOR:
        assert job.floor is not None
        return gemm_floor(n, dtype, d=d, **job.floor)
    leaves, others = inputs
    call = call_of(job, op, name, dtype)
    if leaves:
        made = passes(call, leaves, *others)
    else:
        made = Contestant(run=partial(call, *others), setting="")
    made.setting = _setting_of(job, name, dtype)
    return made
