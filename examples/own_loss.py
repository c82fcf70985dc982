"""similarity_lse as a building block: a loss that m3bind does not have, without its matrix.

Decoupled contrastive learning (Yeh et al. 2021, arXiv:2110.06848) leaves the positive out of the
denominator, and its von Mises-Fisher variant weighs the positives.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from m3bind.ops import similarity_lse

NUM, DIM, SCALE, SIGMA = 3000, 64, 10.0, 0.5


def weights(x: Tensor, y: Tensor) -> Tensor:
    """Of each positive: less where the pair is close already."""
    closeness = ((x * y).sum(1) / SIGMA).softmax(0)
    return (2 - len(x) * closeness).detach()


def decoupled(x: Tensor, y: Tensor) -> Tensor:
    ids = torch.arange(len(x))  # equal ids: the pair is left out of both sums
    rows, columns = similarity_lse(x, y, SCALE, row_ids=ids, col_ids=ids)
    return (rows / 2 + columns / 2 - weights(x, y) * SCALE * (x * y).sum(1)).mean()


def decoupled_dense(x: Tensor, y: Tensor) -> Tensor:
    """The same as one would write it first."""
    scores = SCALE * x @ y.T
    negatives = scores.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    sums = (negatives.logsumexp(1) + negatives.logsumexp(0)) / 2
    return (sums - weights(x, y) * scores.diagonal()).mean()


torch.manual_seed(0)
x = F.normalize(torch.randn(NUM, DIM), dim=-1)
y = F.normalize(x + 0.1 * torch.randn(NUM, DIM), dim=-1)
gradients, kept = {}, []


def keep(tensor: Tensor) -> Tensor:
    """Called for whatever autograd keeps for the backward pass."""
    kept.append(tensor.numel())
    return tensor


for loss_fn in (decoupled_dense, decoupled):
    leaf = x.clone().requires_grad_()
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_fn(leaf, y)
    loss.backward()
    gradients[loss_fn] = leaf.grad
    print(f"{loss_fn.__name__:15}  loss {loss.item():.6f}")
    print(f"{'':15}  largest tensor kept for the backward pass: {max(kept) // NUM} numbers a row")

difference = (gradients[decoupled] - gradients[decoupled_dense]).norm()
print(f"relative difference of the gradients {difference / gradients[decoupled_dense].norm():.1e}")
