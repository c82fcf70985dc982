"""The floor of an operator: its GEMMs and nothing else, warm, into outputs that are there."""

from collections.abc import Iterable

import torch
from torch import Tensor
from turns import DTYPES, Contestant, Run, timed, unit_rows

PANELS = (512, 1024)


def gemm_floor(n: int, dtype: str, *, logits: int, teacher: int = 0) -> Contestant:
    """`logits` products for the logits, as many of a teacher's, and the two of the gradient: the
    fastest of whole matrices and panels of rows.

    For float16 also the same products in float32, which many CPUs multiply faster.
    """
    x, y = unit_rows(n, 2, dtype)
    dtypes = (x.dtype, torch.float32) if dtype == "fp16" else (x.dtype,)
    names = {value: key for key, value in DTYPES.items()}
    return fastest(
        Contestant(
            run=_gemms(x.to(kind), y.to(kind), rows, logits, 1 + (teacher > 0)),
            setting=f"{names[kind]} GEMMs, "
            + ("whole matrices" if rows == n else f"panels of {rows}"),
        )
        for kind in dtypes
        for rows in sorted({n, *(size for size in PANELS if size < n)})
    )


def fastest(candidates: Iterable[Contestant]) -> Contestant:
    def seconds(candidate: Contestant) -> float:
        warm = timed(candidate.run)
        return min(timed(candidate.run) for _ in range(1 if warm > 1 else 5))

    return min(candidates, key=seconds)


def _gemms(x: Tensor, y: Tensor, rows: int, logits: int, models: int) -> Run:
    n = len(x)
    grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)
    panel = torch.empty(rows, n, dtype=x.dtype)

    def gemms() -> None:
        for last in [False] * (logits - 1) + [True]:
            for i in range(0, n, rows):
                part = x[i : i + rows]
                for _ in range(models):
                    torch.mm(part, y.T, out=panel[: len(part)])
                if last:
                    torch.mm(panel[: len(part)], y, out=grad_x[i : i + rows])
                    torch.addmm(grad_y, panel[: len(part)].T, part, out=grad_y)

    return gemms
