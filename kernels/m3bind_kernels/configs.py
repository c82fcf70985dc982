"""The configurations that kernels may run with, by processor and dtype; tests compile every one."""

import os
from dataclasses import dataclass, replace
from functools import cache

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class Config:
    """One tile's rows, columns and features a step, and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    piece: int = 32  # columns that the epilogue works on at a time
    programs: int = 1  # on one multiprocessor at a time

    def shared_bytes(self, itemsize: int) -> int:
        """What the operands in flight take, and a piece on its way out."""
        operands = (self.block_m + self.block_n) * self.block_k * itemsize * self.num_stages
        return operands + self.block_m * self.piece * 4


def narrowed(config: Config, block_n: int) -> Config:
    """For features that are no multiple of a step: their masks and addresses would make wider tiles
    spill."""
    return replace(config, block_n=min(config.block_n, block_n))


# Small tiles, so that small matrices have several.
_INTERPRETER = Config(64, 64, 64, 4, 1)
# In 64 KiB of local memory, of which the pieces of a tile take as much as the tile.
_ROCM = Config(64, 64, 32, 4, 2)
_HALF_80 = (Config(128, 128, 32, 8, 4), Config(128, 128, 64, 8, 3))
_HALF_90 = (
    Config(128, 256, 64, 8, 3),
    Config(128, 256, 64, 8, 4),
    Config(128, 128, 64, 8, 4),
)
# Sums of what rounding takes, beside everything that can be asked for: larger pieces would spill.
_ROUNDED_90 = (
    Config(128, 256, 64, 8, 3),
    Config(128, 256, 64, 8, 4, piece=16),
    Config(128, 128, 64, 8, 4),
)
_ROUNDED_100 = (
    Config(128, 256, 64, 8, 3, piece=16),
    Config(128, 256, 64, 8, 4, piece=16),
    Config(128, 128, 64, 8, 4),
)
# What is computed of a pair of siglip takes more registers.
_SIGMOID_80 = (
    Config(128, 128, 32, 8, 4, piece=16),
    Config(128, 128, 64, 8, 3, piece=16),
)
_SIGMOID_90 = (
    Config(128, 256, 64, 8, 3, piece=16),
    Config(128, 256, 64, 8, 4, piece=16),
    Config(128, 128, 64, 8, 4),
)
_SIGMOID_100 = (
    Config(128, 256, 64, 8, 3, piece=8),
    Config(128, 256, 64, 8, 4, piece=8),
)
# Two tiles of dot products at a time, of student and teacher.
_DISTILL_80 = (Config(128, 128, 32, 8, 3, piece=16),)
_DISTILL_90 = (Config(128, 128, 64, 8, 3, piece=16), Config(128, 128, 64, 8, 4, piece=16))
_DIVERGENCE_100 = (Config(128, 128, 64, 8, 3, piece=16), Config(128, 128, 64, 8, 4, piece=8))
# The sums of both directions beside two tiles of 128 x 128 would spill where accumulators are
# registers; sm_100 has memory of their own for them.
_DIVERGENCE_90 = (Config(128, 64, 64, 8, 3, piece=16), Config(128, 64, 64, 8, 4, piece=16))
# The searches' epilogues spill with larger tiles, larger pieces or fewer warps.
_SEARCH_80 = (Config(128, 128, 32, 8, 4, piece=16), Config(128, 128, 64, 8, 3, piece=16))
_SEARCH_90 = (Config(128, 128, 64, 8, 4, piece=16), Config(128, 128, 64, 8, 3, piece=16))
_SEARCH_FLOAT = (Config(64, 64, 16, 8, 3, piece=16),)
_FLOAT = (Config(64, 64, 32, 4, 3, programs=2),)
_DISTILL_FLOAT = (Config(64, 64, 16, 4, 3, piece=16, programs=2),)
# (kernel, 16-bit features, from this compute capability on) -> candidates, the safest guess first.
TABLE: dict[tuple[str, bool, int], tuple[Config, ...]] = {
    ("stats_fwd", True, 80): _HALF_80,
    ("stats_fwd", True, 90): _HALF_90,
    ("stats_fwd", False, 80): _FLOAT,
    ("stats_fwd", True, 120): _HALF_80,  # neither wgmma nor tcgen05, and the memory of sm_89
    ("stats_bwd", True, 80): _HALF_80,
    ("stats_bwd", True, 90): _ROUNDED_90,
    ("stats_bwd", True, 100): _ROUNDED_100,
    ("stats_bwd", True, 120): _HALF_80,
    ("stats_bwd", False, 80): _FLOAT,
    ("siglip_loss", True, 80): _HALF_80,
    ("siglip_loss", True, 90): _HALF_90,
    ("siglip_loss", True, 120): _HALF_80,
    ("siglip_loss", False, 80): _FLOAT,
    ("siglip", True, 80): _SIGMOID_80,
    ("siglip", True, 90): _SIGMOID_90,
    ("siglip", True, 100): _SIGMOID_100,
    ("siglip", True, 120): _SIGMOID_80,
    ("siglip", False, 80): _FLOAT,
    ("distill_fwd", True, 80): _DISTILL_80,
    ("distill_fwd", True, 90): _DIVERGENCE_90,
    ("distill_fwd", True, 100): _DIVERGENCE_100,
    ("distill_fwd", True, 120): _DISTILL_80,
    ("distill_fwd", False, 80): _DISTILL_FLOAT,
    ("distill_bwd", True, 80): _DISTILL_80,
    ("distill_bwd", True, 90): _DISTILL_90,
    ("distill_bwd", True, 120): _DISTILL_80,
    ("distill_bwd", False, 80): _DISTILL_FLOAT,
    ("search", True, 80): _SEARCH_80,
    ("search", True, 90): _SEARCH_90,
    ("search", True, 120): _SEARCH_80,
    ("search", False, 80): _SEARCH_FLOAT,
    # Features read one by one take the registers that larger tiles need. Not a multiple of 64.
    ("search_ragged", True, 80): (Config(64, 64, 64, 8, 3, piece=8),),
    ("search_ragged", False, 80): _SEARCH_FLOAT,
}


def candidates(kernel: str, half: bool, capability: int, shared_limit: int) -> list[Config]:
    """The configurations for a compute capability (80, 90, ...) whose tiles fit its memory."""
    known = [c for k, h, c in TABLE if (k, h) == (kernel, half) and c <= capability]
    listed = TABLE[kernel, half, max(known, default=80)]
    fitting = [c for c in listed if c.shared_bytes(2 if half else 4) <= shared_limit]
    return fitting or [min(listed, key=lambda c: c.shared_bytes(2 if half else 4))]


@cache
def for_device(kernel: str, half: bool, device: torch.device) -> list[Config]:
    """The configurations that may run on a device."""
    if INTERPRETED:
        return [_INTERPRETER]
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return [_ROCM]
    limit = found.shared_memory_per_block_optin
    return candidates(kernel, half, 10 * found.major + found.minor, limit)


@dataclass(frozen=True, slots=True)
class SideConfig:
    """Rows whose gradients a program keeps, columns at a time, features a step of their products,
    all features padded, and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int


def side_config(dtype: torch.dtype, features: int) -> SideConfig:
    """For stats_side; `dtype` is that of the derivatives."""
    block_d = max(16, 1 << (features - 1).bit_length())
    if INTERPRETED:
        return SideConfig(64, 64, 64, block_d, 4, 1)
    # What does not spill: fewer warps, or wider tiles beside masks of features, need too many
    # registers, and where few are needed the compiler keeps to a half or a third of them, and may
    # spill the rest.
    if dtype == torch.float32:
        return SideConfig(32, 32 if block_d <= 64 else 16, 32, block_d, 8, 2)
    wide = block_d != 32 and (block_d <= 128 or features == block_d)
    return SideConfig(64, 64 if wide else 32, 64 if block_d == 128 else 32, block_d, 8, 3)


MOST_RAGGED_COLUMNS = 128


def fitting(configs: list[Config], features: int) -> list[Config]:
    """The configurations as they run with so many features."""
    narrow = (c if features % c.block_k == 0 else narrowed(c, MOST_RAGGED_COLUMNS) for c in configs)
    return list(dict.fromkeys(narrow))


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
