"""clip_loss with its features, row by row with F.cross_entropy in float64, and cases to try."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    logit_bias: float = 0.0,
    labels: Tensor | None = None,
    positive_ids: Any = None,
    mask_ids: Any = None,
    negatives: Tensor | None = None,
    soft_targets: tuple[Tensor, Tensor] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    margin: float = 0.0,
    directions: str = "both",
    reduction: str = "mean",
) -> Any:
    n, m = len(x), len(y)
    weights = torch.zeros(n, m, dtype=torch.float64)
    if soft_targets is not None:
        for i in range(n):
            for column, weight in zip(soft_targets[0][i], soft_targets[1][i], strict=True):
                if column >= 0:
                    weights[i, column] = weight
    elif positive_ids is not None:
        rows, cols = both(positive_ids)
        for i in range(n):
            weights[i] = torch.tensor([float(rows[i] == c) for c in cols])
    else:
        for i in range(n):
            label = i if labels is None else int(labels[i])
            if label >= 0:
                weights[i, label] = 1
    logits = scale * (x @ y.T - margin * (weights > 0).double()) + logit_bias
    masked = torch.zeros(n, m, dtype=torch.bool)
    if mask_ids is not None:
        rows, cols = both(mask_ids)
        masked = (rows[:, None] == cols) & (weights == 0)
    extra = torch.zeros(n, 0, dtype=torch.float64)
    if negatives is not None:
        shared = negatives.expand(n, *negatives.shape[-2:])
        extra = scale * (x[:, None] * shared).sum(2) + logit_bias
    nothing = torch.zeros(m, 0, dtype=torch.float64)
    found = {
        "rows": one_direction(logits, masked, weights, extra, label_smoothing, z_loss),
        "columns": one_direction(logits.T, masked.T, weights.T, nothing, label_smoothing, z_loss),
    }
    wanted = ("rows", "columns") if directions == "both" else (directions,)
    if reduction == "none":
        out = tuple(torch.stack(found[name][0]) for name in wanted)
        return out if len(out) == 2 else out[0]
    parts = []
    for name in wanted:
        losses, count = found[name]
        parts.append(sum(losses) / (count if reduction == "mean" else 1))
    return sum(parts) / len(parts)


def both(ids: Any) -> tuple[Tensor, Tensor]:
    return (ids, ids) if isinstance(ids, Tensor) else ids


def one_direction(
    logits: Tensor, masked: Tensor, weights: Tensor, extra: Tensor, smoothing: float, z_loss: float
) -> tuple[list[Tensor], int]:
    losses, count = [], 0
    for i in range(len(logits)):
        if weights[i].sum() == 0:
            losses.append(0 * logits.sum())
            continue
        count += 1
        row = torch.cat([logits[i, ~masked[i]], extra[i]])
        target = torch.cat([weights[i, ~masked[i]], torch.zeros(extra.shape[1])])
        loss = F.cross_entropy(row[None], (target / target.sum())[None], label_smoothing=smoothing)
        losses.append(loss + z_loss * row.logsumexp(0) ** 2)
    return losses, count


def cases(n: int, m: int, d: int, seed: int) -> dict[str, dict[str, Any]]:
    """Arguments of clip_loss for x [n, d], y [m, d], n <= m; ids repeat, some rows have nothing."""
    g = torch.Generator().manual_seed(seed)

    def ids(count: int, high: int) -> Tensor:
        return torch.randint(-3, high, (count,), generator=g)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=g), dim=-1)

    labels = torch.randint(0, m, (n,), generator=g)
    labels[:: max(2, n // 3)] = -100
    few = (ids(n, 3), ids(m, 3))  # large classes, and rows and columns without any positive
    few[0][0] = 9
    several = (ids(n, m // 2 + 1), ids(m, m // 2 + 1))  # classes of one row, one column, several
    k = min(3, m)
    columns = torch.stack([torch.randperm(m, generator=g)[:k] for _ in range(n)])
    if k > 1:
        columns[::4, 1] = -100
    soft = (columns, torch.rand(n, k, generator=g))
    patients = (ids(n, n // 3 + 1), ids(m, n // 3 + 1))
    return {
        "bias": {"logit_bias": -7.5},
        "labels": {"labels": labels},
        "labels to few columns": {"labels": torch.randint(0, min(2, m), (n,), generator=g)},
        "positive_ids": {"positive_ids": several},
        "large classes": {"positive_ids": few},
        "mask_ids": {"mask_ids": patients},
        "mask_ids that hold the positives": {
            "mask_ids": (torch.arange(n) // 2, torch.arange(m) // 2)
        },
        "positive_ids and mask_ids": {"positive_ids": several, "mask_ids": patients},
        "large classes and mask_ids": {"positive_ids": few, "mask_ids": patients},
        "shared negatives": {"negatives": unit(5, d)},
        "negatives of each row": {"negatives": unit(n, 4, d)},
        "soft targets": {"soft_targets": soft},
        "soft targets and mask_ids": {"soft_targets": soft, "mask_ids": patients},
        "smoothing": {"label_smoothing": 0.1},
        "margin": {"margin": 0.2},
        "margin at large classes": {"margin": 0.2, "positive_ids": few},
        "z_loss and bias": {"z_loss": 1e-3, "logit_bias": 2.0},
        "rows": {"directions": "rows"},
        "columns": {"directions": "columns", "labels": labels},
        "everything with classes": {
            "positive_ids": several, "mask_ids": patients, "negatives": unit(5, d), "margin": 0.1,
            "label_smoothing": 0.2, "z_loss": 1e-3, "logit_bias": 0.5,
        },
        "everything with soft targets": {
            "soft_targets": soft, "mask_ids": patients, "negatives": unit(n, 2, d),
            "label_smoothing": 0.2, "z_loss": 1e-3,
        },
    }  # fmt: skip
