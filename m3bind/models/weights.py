"""Published weights: a safetensors file, and its description beside it. No pickle is involved."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from m3bind.errors import M3BindError
from m3bind.files import write_json, write_tensors

CONFIG = "m3bind_config.json"


def export_weights(path: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Publish weights: plain safetensors, with ``m3bind_config.json`` in the same folder."""
    write_tensors(path, {name: _bare(tensor) for name, tensor in weights.items()}, {"format": "pt"})
    write_json(path.parent / CONFIG, config)


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


def _bare(tensor: Tensor) -> Tensor:
    # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise M3BindError(f"no weights at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise M3BindError(f"{path} is not a whole safetensors file ({error})") from None
