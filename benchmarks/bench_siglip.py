"""siglip_loss, forward and backward, beside its peers and the floor of three bare GEMMs."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from floor import gemm_floor
from rows import report
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
    logits = scale * x @ y.T + bias
    z = 2 * torch.eye(len(x)) - 1
    return -F.logsigmoid(z * logits).sum() / len(x)


LOSSES = {
    "m3bind": (lambda: siglip_loss, f"{ours('siglip_loss')}, fp32"),
    "m3bind chunked": (
        lambda: partial(siglip_loss, backend="chunked"), "plain PyTorch in panels, fp32",
    ),
    "open_clip": (lambda: peer("open_clip.loss", "open_clip_torch").SigLipLoss(), "eager, fp32"),
    "torch.compile": (
        lambda: fullgraph(one_matrix_loss), "one matrix, fullgraph, static shapes, fp32",
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
