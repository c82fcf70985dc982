"""Checkpoints: one safetensors file each, replaced in one move, read without running code.

Tensors stand under a section's name (``model/...``, ``optimizer/...``, ``loader/...``,
``random/...``), everything else as JSON in the file's header. No pickle is involved, so a
checkpoint from a stranger can be opened. The new file is written beside the old one and then
renamed over it: whatever happens, one whole checkpoint is there.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3bind.errors import M3BindError
from m3bind.files import atomic_write, write_tensors

FORMAT = "m3bind-checkpoint-2"
CONFIG = "m3bind_config.json"  # beside published weights


def save_checkpoint(
    path: Path, sections: Mapping[str, Mapping[str, Tensor]], data: Mapping[str, Any]
) -> None:
    """Write ``{section: {name: tensor}}`` and JSON-able ``data``, atomically."""
    tensors = {
        f"{section}/{name}": _bare(tensor)
        for section, part in sections.items()
        for name, tensor in part.items()
    }
    write_tensors(path, tensors, {"format": FORMAT, "data": json.dumps(data)})


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `save_checkpoint` wrote; raises M3BindError for any other file."""
    tensors, metadata = _read(path)
    if metadata.get("format") != FORMAT:
        raise M3BindError(f"{path} is not a checkpoint of this version ({FORMAT})")
    sections: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        section, _, name = full.partition("/")
        sections.setdefault(section, {})[name] = tensor
    return sections, json.loads(metadata["data"])


def export_weights(path: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Publish weights: plain safetensors, with ``m3bind_config.json`` in the same folder."""
    write_tensors(path, {name: _bare(tensor) for name, tensor in weights.items()}, {"format": "pt"})
    target = path.parent / CONFIG
    with atomic_write(target) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")


def import_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `export_weights` wrote; the configuration is {} where its file is missing."""
    return _read(path)[0], import_config(path)


def import_config(path: Path) -> dict[str, Any]:
    """The configuration alone of what `export_weights` wrote; {} where its file is missing."""
    config = path.parent / CONFIG
    try:
        return json.loads(config.read_text()) if config.is_file() else {}
    except ValueError as error:
        raise M3BindError(f"{config} is damaged ({error}): train again, or restore it") from None


def pack_random(rng: random.Random) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of ``rng`` and of the generators of Python, NumPy, torch and this process's GPU."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, keys, position, has_gauss, gauss = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return tensors, {
        "task": rng.getstate(),
        "python": random.getstate(),
        "numpy": [str(name), int(position), int(has_gauss), float(gauss)],
    }


def unpack_random(
    rng: random.Random, tensors: Mapping[str, Tensor], data: Mapping[str, Any]
) -> None:
    """The inverse of `pack_random`."""
    for generator, key in ((rng, "task"), (random, "python")):
        version, keys, gauss = data[key]
        generator.setstate((version, tuple(keys), gauss))
    name, position, has_gauss, gauss = data["numpy"]
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, gauss))
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])


def pack_bytes(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def unpack_bytes(tensor: Tensor) -> bytes:
    """The inverse of `pack_bytes`."""
    return tensor.numpy().tobytes()


def _bare(tensor: Tensor) -> Tensor:
    # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise M3BindError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise M3BindError(f"{path} is not a whole safetensors file ({error})") from None
