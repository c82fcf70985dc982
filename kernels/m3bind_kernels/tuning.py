"""Chooses among the configurations of a kernel by measuring them once, and remembers the choice."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from m3bind_kernels.configs import Config, fitting, for_device
from m3bind_kernels.launch import Inputs

# Below this many pairs the difference is less than the time of the launches.
WORTH_MEASURING = 1 << 22
# A part of the rows tells enough.
MEASURED_ROWS = 4096

_known: dict[str, int] = {}


def measure(attempt: Callable[[], object]) -> float:
    """Milliseconds."""
    return triton.testing.do_bench(attempt, warmup=10, rep=40)


def choose(kernel: str, inputs: Inputs, attempt: Callable[[Inputs, Config], object]) -> Config:
    """The fastest configuration; `attempt` runs the kernel once on some rows.

    The first one, unmeasured, where the matrix is small, where a CUDA graph is being captured, and
    under `torch.use_deterministic_algorithms`, since another tile adds up in another order.
    """
    device = inputs.x.device
    features = inputs.x.shape[1]
    configs = fitting(for_device(kernel, inputs.x.dtype != torch.float32, device), features)
    num_rows, num_cols = inputs.shape
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    fixed = capturing or torch.are_deterministic_algorithms_enabled()
    if len(configs) == 1 or num_rows * num_cols < WORTH_MEASURING or fixed:
        return configs[0]
    key = _key(kernel, inputs, configs)
    if key not in _known:
        _known.update(_read())
    if key not in _known:
        part = inputs.rows(slice(0, MEASURED_ROWS))
        times = [_time(attempt, part, config) for config in configs]
        _known[key] = times.index(min(times))
        _write(_known)
    return configs[_known[key]]


def _time(attempt: Callable[[Inputs, Config], object], part: Inputs, config: Config) -> float:
    try:
        return measure(lambda: attempt(part, config))
    except OutOfResources:
        return float("inf")


def _key(kernel: str, inputs: Inputs, configs: list[Config]) -> str:
    """What the choice depends on; sizes to the next power of two."""
    device = inputs.x.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    sizes = [size.bit_length() for size in inputs.shape]
    return repr(
        (kernel, name, triton.__version__, str(inputs.x.dtype), inputs.x.shape[1], sizes, configs)
    )


def _file() -> Path:
    return Path(triton.knobs.cache.dir) / "m3bind_configurations.json"


def _read() -> dict[str, int]:
    try:
        return json.loads(_file().read_text())
    except (OSError, ValueError):
        return {}


def _write(known: dict[str, int]) -> None:
    """Beside Triton's own cache; without it every process measures for itself."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=_file().parent, suffix=".json", delete=False
        ) as file:
            json.dump(known, file)
        os.replace(file.name, _file())
    except OSError:
        pass
