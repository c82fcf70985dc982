"""clip_loss, forward and backward, beside its peers and the floor of four bare GEMMs."""

from functools import cache, partial

import pytest
import torch
from clip_contestants import CONTESTANTS, OURS, SCALE, checkpointed_panels, contestant
from rows import report
from turns import CHOSEN_DTYPES, FEATURES, SIZES, Taken, in_turns, peer, unit_rows

from m3bind.ops import clip_loss

# Above it the float16 GEMMs of the peers take minutes a call on a CPU.
LARGEST_FP16 = 1024
CASES = [(d, n) for d in CHOSEN_DTYPES for n in SIZES if d != "fp16" or n <= LARGEST_FP16]


@cache
def turns(dtype: str, n: int) -> dict[str, Taken]:
    return in_turns({name: partial(contestant, name, n, dtype) for name in CONTESTANTS})


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize(("dtype", "n"), CASES)
def test_clip_loss_forward_backward(benchmark, name, dtype, n):
    report(
        benchmark, f"clip_loss {dtype} forward+backward N={n} D={FEATURES}", name,
        turns(dtype, n)[name], op="clip_loss", kind="time", dtype=dtype, n=n,
        flop=8 * n * n * FEATURES,
    )  # fmt: skip


def test_contestants_compute_the_same():
    x, y = unit_rows(600, 2)
    scale = torch.tensor(SCALE)
    want = clip_loss(x, y, scale, backend="reference")
    losses = [make() for make, _ in OURS.values()]
    losses += [checkpointed_panels, peer("open_clip.loss", "open_clip_torch").ClipLoss()]
    for loss in losses:
        torch.testing.assert_close(loss(x, y, scale), want, rtol=1e-5, atol=1e-5)
