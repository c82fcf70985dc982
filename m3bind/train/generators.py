"""The state of every random generator, in tensors and plain values."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
