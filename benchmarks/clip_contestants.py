"""Who computes the symmetric loss of CLIP, each at its best documented setting.

All take the same features. In 16 bit the peers run under autocast, as open_clip trains, which
rounds their logits; m3bind forms its logits in float32 all the same.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from demands import KEPT
from floor import gemm_floor
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from turns import Contestant, fullgraph, ours, peer, step, unit_rows

from m3bind.ops import clip_loss
from m3bind.ops.stats import MEMORY_BUDGET

SCALE = 100.0
PANEL_ROWS = 512
AMPLE_MIB = 1 << 20

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def one_matrix_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def checkpointed_panels(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """What people write when the matrix does not fit: panels of rows, recomputed for the gradient.

    The columns' LSE is merged from those of the panels, so this is the whole symmetric loss.
    """
    labels = torch.arange(len(x), device=x.device)

    def panel(part, y, scale, labels):
        logits = scale * part @ y.T
        return F.cross_entropy(logits, labels, reduction="sum"), logits.float().logsumexp(0)

    parts = [
        checkpoint(
            panel, x[i : i + PANEL_ROWS], y, scale, labels[i : i + PANEL_ROWS], use_reentrant=False
        )
        for i in range(0, len(x), PANEL_ROWS)
    ]
    rows = torch.stack([loss for loss, _ in parts]).sum() / len(x)
    columns = torch.stack([lse for _, lse in parts]).logsumexp(0)
    return (rows + (columns - scale * (x.float() * y.float()).sum(1)).mean()) / 2


def inf_cl() -> Loss:
    one_side = peer("inf_cl", "inf-cl", cuda=True).cal_flash_loss
    return lambda x, y, scale: (
        (one_side(x, y, scale=scale).mean() + one_side(y, x, scale=scale).mean()) / 2
    )


def cut_cross_entropy() -> Loss:
    module = peer("cut_cross_entropy", "cut-cross-entropy", cuda=True)

    def loss(x, y, scale):
        labels = torch.arange(len(x), device=x.device)
        one_side = module.linear_cross_entropy
        return (one_side(scale * x, y, labels) + one_side(scale * y, x, labels)) / 2

    return loss


# What makes the loss, and its setting. Made when its turn comes: a peer may be missing.
OURS: dict[str, tuple[Callable[[], Loss], str]] = {
    "m3bind": (lambda: clip_loss, f"memory_budget {MEMORY_BUDGET:g} MiB, as by default"),
    KEPT: (lambda: partial(clip_loss, memory_budget=AMPLE_MIB), "memory_budget for all of them"),
    "m3bind chunked": (lambda: partial(clip_loss, backend="chunked"), "plain PyTorch in panels"),
}
PEERS: dict[str, tuple[Callable[[], Loss], str]] = {
    "open_clip": (lambda: peer("open_clip.loss", "open_clip_torch").ClipLoss(), "eager"),
    "torch.compile": (
        lambda: fullgraph(one_matrix_loss), "one matrix, fullgraph, static shapes",
    ),
    "checkpointed panels": (lambda: checkpointed_panels, f"checkpoint, panels of {PANEL_ROWS}"),
    "inf-cl": (inf_cl, "a call for each direction"),
    "cut-cross-entropy": (cut_cross_entropy, "a call for each direction"),
}  # fmt: skip
CONTESTANTS = (*OURS, *PEERS, "floor")


def autocast(loss: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    def run(x, *others):
        with torch.autocast(x.device.type, dtype):
            return loss(x, *others)

    return run


def contestant(name: str, n: int, dtype: str, seed: int = 0) -> Contestant:
    if name == "floor":
        return gemm_floor(n, dtype, logits=2)
    make, setting = {**OURS, **PEERS}[name]
    if name in ("m3bind", KEPT):
        setting = f"{ours('clip_loss', dtype)}, {setting}"
    loss = make()
    x, y = unit_rows(n, 2, dtype, seed)
    if dtype == "fp32":
        setting += ", fp32"
    elif name in OURS:
        setting += f", {dtype} features, fp32 logits"
    else:
        loss, setting = autocast(loss, x.dtype), f"{setting}, autocast {dtype}"
    return Contestant(run=step(loss, (x, y, torch.tensor(SCALE))), setting=setting)
