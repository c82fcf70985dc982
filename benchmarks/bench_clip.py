"""clip_loss, forward and backward, beside its peers and the floor of four bare GEMMs.

In bf16 the peers run under autocast, which is how open_clip trains; m3bind forms its logits in
float32 all the same. See turns.py for which numbers to compare.
"""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from turns import (
    DTYPES,
    FEATURES,
    ROUNDS,
    SIZES,
    Run,
    gemm_floor,
    in_turns,
    record,
    step,
    unit_rows,
)

from m3bind.ops import clip_loss

SCALE = 100.0
CONTESTANTS = (
    "m3bind", "m3bind kept", "m3bind chunked", "open_clip", "torch.compile", "checkpointed panels",
    "floor",
)  # fmt: skip


def one_matrix_loss(x, y, scale):
    logits = scale * x @ y.T
    labels = torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def checkpointed_panels(x, y, scale):
    """What people write when the matrix does not fit: panels of rows, recomputed for the gradient.

    The columns' LSE is merged from those of the panels, so this is the whole symmetric loss.
    """
    labels = torch.arange(len(x))

    def panel(part, y, scale, labels):
        logits = scale * part @ y.T
        return F.cross_entropy(logits, labels, reduction="sum"), logits.logsumexp(0)

    size = 512
    parts = [
        checkpoint(panel, x[i : i + size], y, scale, labels[i : i + size], use_reentrant=False)
        for i in range(0, len(x), size)
    ]
    rows = torch.stack([loss for loss, _ in parts]).sum() / len(x)
    columns = torch.stack([lse for _, lse in parts]).logsumexp(0)
    return (rows + (columns - scale * (x * y).sum(1)).mean()) / 2


def autocast(loss):
    def run(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(*args)

    return run


def contestant(name: str, n: int, dtype: str) -> Run:
    if name == "floor":
        return gemm_floor(n, dtype, logits=2)
    if name.startswith("m3bind"):
        backend = "chunked" if name == "m3bind chunked" else None
        budget = n * n * 4 / 2**20 if name == "m3bind kept" else 0  # MiB for all dot products
        loss = partial(clip_loss, memory_budget=budget, backend=backend)
        return step(loss, (*unit_rows(n, 2, dtype), torch.tensor(SCALE)))
    losses = {
        "open_clip": lambda: pytest.importorskip("open_clip.loss").ClipLoss(),
        "torch.compile": lambda: torch.compile(one_matrix_loss, fullgraph=True),
        "checkpointed panels": lambda: checkpointed_panels,
    }
    loss = losses[name]()
    x, y = unit_rows(n, 2)  # as a model under autocast keeps them
    return step(loss if dtype == "fp32" else autocast(loss), (x, y, torch.tensor(SCALE)))


@cache
def turns(n: int, dtype: str) -> dict[str, list[float]]:
    return in_turns({name: contestant(name, n, dtype) for name in CONTESTANTS})


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_clip_loss_forward_backward(benchmark, name, dtype, n):
    benchmark.group = f"clip_loss {dtype} forward+backward N={n} D={FEATURES}"
    record(benchmark, name, turns(n, dtype), op="clip_loss", dtype=dtype, flop=8 * n * n * FEATURES)
    benchmark.pedantic(contestant(name, n, dtype), rounds=ROUNDS, warmup_rounds=2)
