"""siglip_loss, forward and backward, beside its peers and the floor of three bare GEMMs."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from clip_contestants import autocast
from floor import PANELS, gemm_floor
from rows import report
from torch.utils.checkpoint import checkpoint
from turns import (
    CHOSEN_DTYPES,
    DTYPES,
    FEATURES,
    SIZES,
    Contestant,
    Taken,
    fullgraph,
    in_turns,
    ours,
    peer,
    step,
    unit_rows,
)

from m3bind.ops import siglip_loss

SCALE, BIAS = 117.33, -12.93  # of the published SigLIP models


def one_matrix_loss(x, y, scale, bias):
    """Without a second matrix, of signs: softplus(-z) = softplus(z) - z at the positives. Compiled,
    this is faster than the formula with signs."""
    logits = scale * x @ y.T + bias
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(x)


def checkpointed_panels(x, y, scale, bias):
    """Panels of rows, recomputed for the gradient."""

    def panel(part, y, scale, bias, first):
        logits = scale * part @ y.T + bias
        positive = torch.arange(len(part), device=part.device)
        return F.softplus(logits).sum() - logits[positive, first + positive].sum()

    size = PANELS[0]
    parts = [
        checkpoint(panel, x[i : i + size], y, scale, bias, i, use_reentrant=False)
        for i in range(0, len(x), size)
    ]
    return torch.stack(parts).sum() / len(x)


# What makes the loss, and its setting.
OURS = {
    "m3bind": (lambda: siglip_loss, ""),
    "m3bind chunked": (
        lambda: partial(siglip_loss, backend="chunked"), "plain PyTorch in panels",
    ),
}  # fmt: skip
PEERS = {
    "open_clip": (lambda: peer("open_clip.loss", "open_clip_torch").SigLipLoss(), "eager"),
    "torch.compile": (
        lambda: fullgraph(one_matrix_loss), "one matrix, fullgraph, static shapes",
    ),
    "checkpointed panels": (lambda: checkpointed_panels, f"checkpoint, panels of {PANELS[0]}"),
}  # fmt: skip
CONTESTANTS = (*OURS, *PEERS, "floor")
# Above it the float16 GEMMs of the peers take minutes a call on a CPU.
LARGEST_FP16 = 1024
CASES = [(d, n) for d in CHOSEN_DTYPES for n in SIZES if d != "fp16" or n <= LARGEST_FP16]


def contestant(name: str, n: int, dtype: str) -> Contestant:
    """In 16 bit the peers run under autocast, as in `clip_contestants`."""
    if name == "floor":
        return gemm_floor(n, dtype, logits=1)
    make, setting = {**OURS, **PEERS}[name]
    loss, setting = make(), setting or ours("siglip_loss", dtype)
    leaves = (*unit_rows(n, 2, dtype), torch.tensor(SCALE), torch.tensor(BIAS))
    if dtype == "fp32":
        setting += ", fp32"
    elif name in OURS:
        setting += f", {dtype} features, fp32 logits"
    else:
        loss, setting = autocast(loss, DTYPES[dtype]), f"{setting}, autocast {dtype}"
    return Contestant(run=step(loss, leaves), setting=setting)


@cache
def turns(dtype: str, n: int) -> dict[str, Taken]:
    return in_turns({name: partial(contestant, name, n, dtype) for name in CONTESTANTS})


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize(("dtype", "n"), CASES)
def test_siglip_loss_forward_backward(benchmark, name, dtype, n):
    report(
        benchmark, f"siglip_loss {dtype} forward+backward N={n} D={FEATURES}", name,
        turns(dtype, n)[name], op="siglip_loss", kind="time", dtype=dtype, n=n,
        flop=6 * n * n * FEATURES,
    )  # fmt: skip


def test_contestants_compute_the_same():
    args = (*unit_rows(600, 2), torch.tensor(SCALE), torch.tensor(BIAS))
    want = siglip_loss(*args, backend="reference")
    uncompiled = {**OURS, **PEERS, "torch.compile": (lambda: one_matrix_loss, "")}
    for loss in (make() for make, _ in uncompiled.values()):
        torch.testing.assert_close(loss(*args), want, rtol=1e-5, atol=1e-5)
