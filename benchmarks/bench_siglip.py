"""siglip_loss, forward and backward, beside its peers and the floor of three bare GEMMs."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from floor import PANELS, gemm_floor
from rows import report
from torch.utils.checkpoint import checkpoint
from turns import (
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


LOSSES = {
    "m3bind": (lambda: siglip_loss, f"{ours('siglip_loss')}, fp32"),
    "m3bind chunked": (
        lambda: partial(siglip_loss, backend="chunked"), "plain PyTorch in panels, fp32",
    ),
    "open_clip": (lambda: peer("open_clip.loss", "open_clip_torch").SigLipLoss(), "eager, fp32"),
    "torch.compile": (
        lambda: fullgraph(one_matrix_loss), "one matrix, fullgraph, static shapes, fp32",
    ),
    "checkpointed panels": (
        lambda: checkpointed_panels, f"checkpoint, panels of {PANELS[0]}, fp32",
    ),
}  # fmt: skip
CONTESTANTS = (*LOSSES, "floor")


def contestant(name: str, n: int) -> Contestant:
    if name == "floor":
        return gemm_floor(n, "fp32", logits=1)
    make, setting = LOSSES[name]
    leaves = (*unit_rows(n, 2), torch.tensor(SCALE), torch.tensor(BIAS))
    return Contestant(run=step(make(), leaves), setting=setting)


@cache
def turns(n: int) -> dict[str, Taken]:
    return in_turns({name: partial(contestant, name, n) for name in CONTESTANTS})


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("n", SIZES)
def test_siglip_loss_forward_backward(benchmark, name, n):
    report(
        benchmark, f"siglip_loss fp32 forward+backward N={n} D={FEATURES}", name, turns(n)[name],
        op="siglip_loss", kind="time", dtype="fp32", n=n, flop=6 * n * n * FEATURES,
    )  # fmt: skip


def test_contestants_compute_the_same():
    args = (*unit_rows(600, 2), torch.tensor(SCALE), torch.tensor(BIAS))
    want = siglip_loss(*args, backend="reference")
    uncompiled = {**LOSSES, "torch.compile": (lambda: one_matrix_loss, "")}
    for loss in (make() for make, _ in uncompiled.values()):
        torch.testing.assert_close(loss(*args), want, rtol=1e-5, atol=1e-5)
