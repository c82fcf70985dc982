"""How far the gradient of clip_loss is from float64, beside PyTorch's.

The truth is the same formula in float64 on the same rounded features. An error is the norm of the
difference over the norm of the gradient, the worst of x and y and of all seeds. Peers: the formula
with logits in float32 (its gradient is rounded to the features' dtype, as everybody's is), and
open_clip as it trains. Times are those of one call and say nothing.
"""

from functools import cache

import pytest
import torch
from clip_contestants import SCALE, contestant, one_matrix_loss
from rows import report
from turns import CHOSEN_DTYPES, FEATURES, SIZES, Contestant, Taken, problem, step, timed, unit_rows

N = min(4096, max(SIZES))
SEEDS = range(5)
CONTESTANTS = ("m3bind", "fp32 logits", "open_clip")
# float16 on a CPU takes the peers too long for the largest batch.
CASES = [(dtype, min(N, 1024) if dtype == "fp16" else N) for dtype in CHOSEN_DTYPES]


def fp32_logits(n: int, dtype: str, seed: int) -> Contestant:
    def loss(x, y, scale):
        return one_matrix_loss(x.float(), y.float(), scale)

    leaves = (*unit_rows(n, 2, dtype, seed), torch.tensor(SCALE))
    return Contestant(run=step(loss, leaves), setting="one matrix, logits in fp32")


@cache
def truth(dtype: str, n: int, seed: int) -> list[torch.Tensor]:
    x, y = (x.double() for x in unit_rows(n, 2, dtype, seed))
    run = step(one_matrix_loss, (x, y, torch.tensor(SCALE, dtype=torch.float64)))
    return list(run()[:2])


def errors(name: str, dtype: str, n: int) -> tuple[Taken, list[float]]:
    taken, worst = Taken(), []
    try:
        for seed in SEEDS:
            peer = name == "fp32 logits"
            one = fp32_logits(n, dtype, seed) if peer else contestant(name, n, dtype, seed)
            taken.setting = one.setting
            found: list[torch.Tensor] = []
            taken.seconds.append(timed(lambda f=found, run=one.run: f.extend(run()[:2])))
            pairs = zip(found, truth(dtype, n, seed), strict=True)
            worst.append(max(float((g.double() - t).norm() / t.norm()) for g, t in pairs))
    except Exception as error:
        taken.problem = problem(error)
    return taken, worst


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize(("dtype", "n"), CASES)
def test_clip_loss_gradient_error(benchmark, name, dtype, n):
    taken, worst = errors(name, dtype, n)
    group = f"clip_loss {dtype} gradient error N={n} D={FEATURES} scale={SCALE:.0f}"
    report(
        benchmark, group, name, taken, op="clip_loss", kind="error", dtype=dtype, n=n,
        seeds=len(worst), **({} if taken.problem else {"gradient_error": max(worst)}),
    )  # fmt: skip
