"""The configurations that kernels may run with, by processor and dtype; tests compile every one."""

import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class Config:
    """One tile's rows, columns and features a step, and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    piece: int = 64  # columns that the epilogue works on at a time
    programs: int = 1  # on one multiprocessor at a time

    def shared_bytes(self, itemsize: int, stores_tile: bool) -> int:
        """What the operands in flight take, and the tile on its way out."""
        operands = (self.block_m + self.block_n) * self.block_k * itemsize * self.num_stages
        return operands + stores_tile * self.block_m * self.block_n * itemsize


# Small tiles, so that small matrices have several.
_INTERPRETER = Config(64, 64, 64, 4, 1, piece=32)
_HALF_80 = (Config(128, 128, 32, 8, 4, programs=2), Config(128, 128, 64, 8, 3))
_HALF_90 = (
    Config(128, 256, 64, 8, 3),
    Config(128, 128, 64, 8, 3, programs=2),
    Config(128, 128, 64, 8, 4),
)
_FLOAT = (Config(64, 64, 32, 4, 3, programs=2), Config(128, 64, 32, 8, 3))
# (kernel, 16-bit, capability from which on) -> candidates, the one to take untried first.
TABLE: dict[tuple[str, bool, int], tuple[Config, ...]] = {
    ("stats_fwd", True, 80): _HALF_80,
    ("stats_fwd", True, 90): _HALF_90,
    ("stats_fwd", True, 100): _HALF_90,
    ("stats_fwd", False, 80): _FLOAT,
    ("stats_bwd", True, 80): _HALF_80,
    ("stats_bwd", True, 90): _HALF_90,
    ("stats_bwd", True, 100): _HALF_90,
    ("stats_bwd", False, 80): _FLOAT,
}


def candidates(kernel: str, half: bool, capability: int) -> tuple[Config, ...]:
    """The configurations for a compute capability (80, 90, ...)."""
    known = [c for k, h, c in TABLE if (k, h) == (kernel, half) and c <= capability]
    return TABLE[kernel, half, max(known, default=80)]


def choose(kernel: str, x: Tensor, y: Tensor) -> Config:
    if INTERPRETED:
        return _INTERPRETER
    half = x.dtype != torch.float32
    return candidates(kernel, half, 90)[0]


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
