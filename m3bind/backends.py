"""THE table: which operator runs in which backend, on which device, in which dtypes.

The only module that names `m3bind._C`, `m3bind._C_cuda` or `m3bind_kernels`, and it imports them
when first asked. An explicit choice (`backend=`, `use_backend`, `M3BIND_BACKEND`) that cannot be
met raises and says why. The automatic one is cpp for tensors on the CPU; on a GPU the fastest that
`_verified.json` lists for it, if its kernels are still those that were verified; else chunked.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from m3bind import chunked, reference, sources, verified

BACKENDS = ("reference", "chunked", "cpp", "triton", "cuda")
# What may be automatic on a GPU once it is verified. The reference never is: it materialises the
# similarity matrix.
ON_GPU = ("cuda", "triton", "chunked")

DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}


class BackendUnavailable(ValueError):
    """An explicitly chosen backend cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One cell of the table. `load` returns the module that holds `<op>_fwd` and `<op>_bwd`."""

    load: Callable[[], Any]
    devices: tuple[str, ...] | None = None  # None: any
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPE_NAMES)
    note: str = ""
    missing: Callable[[], str | None] = lambda: None  # why it cannot run at all, or None
    one_way: bool = False  # it forms the gradient of a single direction in the forward pass
    keeps: str | None = None  # what memory_budget leaves from forward to backward: dots or powers


@cache
def native() -> ModuleType | str:
    """The module m3bind._C, or the reason why it is not there."""
    try:
        return importlib.import_module("m3bind._C")
    except ModuleNotFoundError:
        return "m3bind was installed without its native extension (M3BIND_NATIVE=0)"
    except ImportError as error:
        return f"m3bind._C does not load: {error}"


def _native_missing() -> str | None:
    found = native()
    return found if isinstance(found, str) else None


def _native_ops() -> Any:
    native()
    return torch.ops.m3bind_native


@cache
def kernels() -> ModuleType | str:
    """The package m3bind_kernels, or the reason why it does not load."""
    try:
        return importlib.import_module("m3bind_kernels")
    except ImportError as error:
        return f"m3bind_kernels does not load: {error}"


def _kernels_missing() -> str | None:
    found = kernels()
    return found if isinstance(found, str) else None


@cache
def native_cuda() -> ModuleType | str:
    """The module m3bind._C_cuda, or the reason why it is not there."""
    if torch.version.cuda is None:  # a module with CUDA objects would not load
        return "this torch is built without CUDA"
    try:
        return importlib.import_module("m3bind._C_cuda")
    except ModuleNotFoundError:
        return "m3bind was built without kernels in CUDA C++"
    except ImportError as error:
        return f"m3bind._C_cuda does not load: {error}"


def _cuda_missing(primitive: str) -> str | None:
    found = native_cuda()
    if isinstance(found, str):
        return found
    if primitive not in found.operators:
        return f"m3bind._C_cuda has no {primitive}"
    others = [name for name in architectures() if name not in found.architectures]
    if others:
        built = ", ".join(found.architectures)
        return f"its kernels are built for {built}, not for {', '.join(others)}: triton has others"
    return _kernels_missing()


def _cuda_kernels() -> Any:
    """They stand in for Triton's tiles; the rest of an operator is in m3bind_kernels."""
    native_cuda()
    return importlib.import_module("m3bind_kernels.native")


@cache
def installed_sources(primitive: str, backend: str) -> str | None:
    """The fingerprint of the sources that a backend's kernels are made of, as installed here; None
    where there are none. Reads files, so nobody asks before a tensor is on a GPU."""
    if backend == "cpp":
        return getattr(native(), "sources", None)
    # Those of CUDA C++ are driven by Triton's package.
    compiled = getattr(native_cuda(), "sources", None) if backend == "cuda" else ""
    name = "m3bind_kernels" if backend in ("triton", "cuda") else f"m3bind.{backend}"
    spec = importlib.util.find_spec(name)
    if compiled is None or spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    return compiled + sources.of_package(folder, primitive)


@cache
def architectures() -> tuple[str, ...]:
    """Of all NVIDIA GPUs that torch can use here, each once."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return tuple(sorted({f"sm_{major}{minor}" for major, minor in found}))


def _row(primitive: str, keeps: dict[str, str], **others: Entry) -> tuple[str, dict[str, Entry]]:
    """A primitive: what all have, its entries for the other backends, and what each keeps."""
    always = {
        "reference": Entry(load=lambda: reference, note="materialises; differentiable twice"),
        "chunked": Entry(load=lambda: chunked, note="panels in plain PyTorch"),
        "cuda": Entry(
            load=_cuda_kernels, devices=("cuda",), dtypes=_HALVES,
            note="CUDA C++; where features are no multiple of 8, Triton",
            missing=partial(_cuda_missing, primitive),
        ),
    }  # fmt: skip
    entries = always | others
    return primitive, {name: replace(entries[name], keeps=keeps.get(name)) for name in BACKENDS}


def _native(dtypes: tuple[torch.dtype, ...], note: str, one_way: bool = False) -> Entry:
    return Entry(
        load=_native_ops, devices=("cpu",), dtypes=dtypes, note=note, missing=_native_missing,
        one_way=one_way,
    )  # fmt: skip


def _triton(dtypes: tuple[torch.dtype, ...], note: str) -> Entry:
    # Triton's interpreter runs kernels on the CPU, to test them.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return Entry(
        load=kernels, devices=("cuda", "cpu") if interpreted else ("cuda",), dtypes=dtypes,
        note=note, missing=_kernels_missing,
    )  # fmt: skip


_HALVES = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_HALVES)
_NOTE = "bfloat16 products where the processor has them; float16 is widened"
_NARROW = _native(_FLOATS, _NOTE)
_STATS = _native(_FLOATS, _NOTE, one_way=True)
_SEARCH = _native(_FLOATS, "equal rows have equal scores, bit for bit")
_TRITON = _triton(_FLOATS, "float32 without TF32")
_DOTS, _POWERS = {"chunked": "dots", "cpp": "dots"}, {"triton": "powers", "cuda": "powers"}
TABLE: dict[str, dict[str, Entry]] = dict((
    _row("similarity_stats", _DOTS | _POWERS, cpp=_STATS, triton=_TRITON),
    _row("siglip", {}, cpp=_NARROW, triton=_TRITON),
    _row("similarity_distill", _DOTS, cpp=_NARROW, triton=_TRITON),
    _row("similarity_topk", {}, cpp=_SEARCH, triton=_TRITON),
    _row("similarity_rank", {}, cpp=_SEARCH, triton=_TRITON),
))  # fmt: skip
# Public operators: a primitive of the table, alone or plus terms of O((N + M) * D).
BUILT_ON = {
    "clip_loss": "similarity_stats",
    "similarity_lse": "similarity_stats",
    "siglip_loss": "siglip",
    "similarity_distill": "similarity_distill",
    "similarity_topk": "similarity_topk",
    "similarity_rank": "similarity_rank",
}

_override: str | None = os.environ.get("M3BIND_BACKEND") or None


def why_not(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `op` on such tensors; None where it can."""
    entry = TABLE[BUILT_ON.get(op, op)][backend]
    reason = entry.missing()
    if reason is not None:
        return reason
    if entry.devices is not None and device_type not in entry.devices:
        return f"it runs on {', '.join(entry.devices)} tensors, not on {device_type}"
    if dtype not in entry.dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in entry.dtypes)
        return f"it takes {known}, not {str(dtype).removeprefix('torch.')}"
    return None


@cache
def verified_for(primitive: str, dtype: torch.dtype, here: tuple[str, ...]) -> list[str]:
    """The backends that were verified on all these architectures and whose sources have not changed
    since, the fastest first: a tensor may be on any of the GPUs."""
    speeds = {}
    for backend in ON_GPU:
        records = [
            verified.found(architecture, primitive, backend).get(DTYPE_NAMES[dtype])
            for architecture in here
        ]
        current = [
            record.tflops for record in records
            if record is not None and record.sources == installed_sources(primitive, backend)
        ]  # fmt: skip
        if current and len(current) == len(here):
            speeds[backend] = min(current)
    return sorted(speeds, key=lambda backend: -speeds[backend])


def automatic(op: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend where nobody chose one."""
    candidates = ["cpp"]
    if device_type == "cuda":
        candidates = verified_for(BUILT_ON.get(op, op), dtype, architectures())
    for candidate in (*candidates, "chunked"):
        if why_not(op, candidate, device_type, dtype) is None:
            return candidate
    raise BackendUnavailable(f"no backend runs {op} on {device_type} tensors of {dtype}")


# The answers do not change within a process, and torch.compile can trace no import and no file.
# This is all that torch.compiler.assume_constant_result does, but calling that imports
# torch._dynamo whole, which doubles the time of `import m3bind`.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
automatic._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(op: str, device_type: str, dtype: torch.dtype, backend: str | None = None) -> str:
    """The name of the backend that runs `op`; `backend` is the caller's explicit choice."""
    chosen = backend if backend is not None else _override
    if chosen is not None and chosen != "auto":
        if chosen not in BACKENDS:
            raise BackendUnavailable(
                f"unknown backend {chosen!r}: choose one of {', '.join(BACKENDS)} or auto"
            )
        reason = why_not(op, chosen, device_type, dtype)
        if reason is not None:
            raise BackendUnavailable(
                f"backend {chosen!r} cannot run {op}: {reason}; choose another backend or none"
            )
        return chosen
    return automatic(op, device_type, dtype)


def implementation(op: str, backend: str) -> Any:
    """The module with `<op>_fwd` and `<op>_bwd` of a primitive; `backend` comes from `resolve`."""
    return TABLE[op][backend].load()


def keeps(op: str, backend: str) -> str | None:
    """What a primitive leaves in memory_budget from forward to backward: "dots" or "powers"."""
    return TABLE[op][backend].keeps


def one_way(op: str, backend: str) -> bool:
    """Whether a primitive takes a single direction with three matrix products instead of four."""
    return TABLE[op][backend].one_way


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Chooses the backend of every operator in the process; None or "auto" is the automatic one."""
    global _override
    if backend is not None and backend not in (*BACKENDS, "auto"):
        raise BackendUnavailable(
            f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)} or auto"
        )
    before, _override = _override, backend
    try:
        yield
    finally:
        _override = before
