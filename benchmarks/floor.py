"""The floor of an operator: its GEMMs and nothing else, warm, into outputs that are there."""

import torch
from torch import Tensor
from turns import DEVICE, DTYPES, FEATURES, Contestant, Run, timed, unit_rows

PANELS = (512, 1024) if DEVICE == "cpu" else (2048, 8192)
LARGEST_WHOLE = 16384


def gemm_floor(
    n: int, dtype: str, *, logits: int, teacher: int = 0, d: int = FEATURES
) -> Contestant:
    """`logits` products for the logits, as many of a teacher's, and the two of the gradient: the
    fastest of whole matrices and panels of rows.

    For float16 also the same products in float32, which many CPUs multiply faster.
    """
    x, y = unit_rows(n, 2, dtype, d=d)
    models = 1 + (teacher > 0)
    kinds = (x.dtype, torch.float32) if dtype == "fp16" else (x.dtype,)
    sizes = [size for size in PANELS if size < n] + ([n] if n <= LARGEST_WHOLE else [])
    # Of a batch too large to be held whole, some panels tell which size is the fastest.
    tried = x if n <= LARGEST_WHOLE else x[: 2 * max(PANELS)]

    def seconds(choice: tuple[torch.dtype, int]) -> float:
        kind, rows = choice
        run = _gemms(tried.to(kind), y.to(kind), rows, logits, models)
        warm = timed(run)
        return min(timed(run) for _ in range(1 if warm > 1 else 5))

    kind, rows = min(((kind, rows) for kind in kinds for rows in sizes), key=seconds)
    name = next(name for name, value in DTYPES.items() if value == kind)
    return Contestant(
        run=_gemms(x.to(kind), y.to(kind), rows, logits, models),
        setting=f"{name} GEMMs, " + ("whole matrices" if rows == n else f"panels of {rows}"),
    )


def _gemms(x: Tensor, y: Tensor, rows: int, logits: int, models: int) -> Run:
    grad_x, grad_y = torch.empty_like(x), torch.zeros_like(y)
    panel = x.new_empty(rows, len(y))

    def gemms() -> None:
        for last in [False] * (logits - 1) + [True]:
            for i in range(0, len(x), rows):
                part = x[i : i + rows]
                for _ in range(models):
                    torch.mm(part, y.T, out=panel[: len(part)])
                if last:
                    torch.mm(panel[: len(part)], y, out=grad_x[i : i + rows])
                    torch.addmm(grad_y, panel[: len(part)].T, part, out=grad_y)

    return gemms
