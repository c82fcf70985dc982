"""What tests of kept powers share: when they are kept, and what the forward pass left."""

import pytest
import torch
from test_memory_budget import kept_of
from test_triton_stats import DEVICE

from m3bind.ops import clip_loss, stats
from m3bind_kernels import configs, kept
from m3bind_kernels.launch import Inputs

ALL = 1000.0  # MiB
FEATURES = 72


def tile_of(dtype: torch.dtype) -> configs.Config:
    found = configs.for_device("stats_fwd", dtype != torch.float32, torch.device(DEVICE))
    return configs.fitting(found, FEATURES)[0]


LARGER = tile_of(torch.float16).block_n // 64  # tiles are kept where they are whole
N = 150 * LARGER


@pytest.fixture(autouse=True)
def worth_it(many_waves, monkeypatch):
    """As for very large matrices of many features: they are kept at all."""
    monkeypatch.setattr(stats, "FEW_FEATURES", 0)
    monkeypatch.setattr(stats, "FEW_PAIRS", 0)


def of_loss(x, y, scale, **options) -> kept.Kept:
    """What the forward pass keeps of a loss."""
    x, y = (t.to(DEVICE).requires_grad_() for t in (x, y))
    memory = kept_of(clip_loss(x, y, scale, backend="triton", memory_budget=ALL, **options))
    found = kept.Kept.of(inputs_of(x, y), memory)
    assert found is not None
    return found


def inputs_of(x, y) -> Inputs:
    return Inputs.of(x, y, torch.ones((), device=x.device), None, None, None, None, 0.0, False)


def tiles_kept(found: kept.Kept) -> torch.Tensor:
    return found.shifts.isfinite().cpu()


def tiles_to_keep(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Whole tiles that do not meet the diagonal."""
    tile = tile_of(dtype)
    row, col = torch.arange(0, n, tile.block_m)[:, None], torch.arange(0, n, tile.block_n)[None]
    whole = (row + tile.block_m <= n) & (col + tile.block_n <= n)
    return whole & ((row >= col + tile.block_n) | (col >= row + tile.block_m))
