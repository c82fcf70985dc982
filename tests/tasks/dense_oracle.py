"""What the tasks' losses are by definition: NumPy, in float64, on whole matrices."""

import numpy as np
import torch
from torch import Tensor


def unit(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def similarities(x: Tensor, y: Tensor, scale: float) -> np.ndarray:
    return scale * x.double().numpy() @ y.double().numpy().T


def dense_clip(x: Tensor, y: Tensor, scale: float, ids: list[int] | None = None) -> float:
    logits = similarities(x, y, scale)
    weights = np.exp(logits)
    if ids is not None:
        same = np.equal.outer(ids, ids)
        weights = np.where(same & ~np.eye(len(ids), dtype=bool), 0, weights)
    rows = np.log(weights.sum(1)) - logits.diagonal()
    columns = np.log(weights.sum(0)) - logits.diagonal()
    return float((rows.mean() + columns.mean()) / 2)


def softmax(logits: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    weights = np.exp(logits) if kept is None else np.where(kept, np.exp(logits), 0)
    return weights / weights.sum(1, keepdims=True)


def mean_kl(p: np.ndarray, q: np.ndarray) -> float:
    terms = [p[i, j] * np.log(p[i, j] / q[i, j]) for i, j in zip(*np.nonzero(p), strict=True)]
    return sum(terms) / len(p)
