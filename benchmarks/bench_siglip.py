"""siglip_loss, forward and backward, beside its peers and the floor of three bare GEMMs."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from turns import FEATURES, ROUNDS, SIZES, Run, gemm_floor, in_turns, record, step, unit_rows

from m3bind.ops import siglip_loss

SCALE, BIAS = 117.33, -12.93  # of the published SigLIP models
CONTESTANTS = ("m3bind", "m3bind chunked", "open_clip", "torch.compile", "floor")


def one_matrix_loss(x, y, scale, bias):
    logits = scale * x @ y.T + bias
    z = 2 * torch.eye(len(x)) - 1
    return -F.logsigmoid(z * logits).sum() / len(x)


def contestant(name: str, n: int) -> Run:
    if name == "floor":
        return gemm_floor(n, "fp32", logits=1)
    losses = {
        "m3bind": lambda: siglip_loss,
        "m3bind chunked": lambda: lambda *args: siglip_loss(*args, backend="chunked"),
        "open_clip": lambda: pytest.importorskip("open_clip.loss").SigLipLoss(),
        "torch.compile": lambda: torch.compile(one_matrix_loss, fullgraph=True),
    }
    return step(losses[name](), (*unit_rows(n, 2), torch.tensor(SCALE), torch.tensor(BIAS)))


@cache
def turns(n: int) -> dict[str, list[float]]:
    return in_turns({name: contestant(name, n) for name in CONTESTANTS})


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_siglip_loss_forward_backward(benchmark, name, n):
    benchmark.group = f"siglip_loss fp32 forward+backward N={n} D={FEATURES}"
    record(benchmark, name, turns(n), op="siglip_loss", flop=6 * n * n * FEATURES)
    benchmark.pedantic(contestant(name, n), rounds=ROUNDS, warmup_rounds=2)
