"""The independent truth of similarity_distill's tests: the formula that users write, in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

Features = tuple[Tensor, Tensor, Tensor, Tensor]  # x, y, teacher_x, teacher_y


def features(
    n: int, m: int, d: int, e: int, *, seed: int, dtype: torch.dtype = torch.float32
) -> Features:
    generator = torch.Generator().manual_seed(seed)
    x, y, teacher_x, teacher_y = (
        torch.randn(*shape, generator=generator) for shape in ((n, d), (m, d), (n, e), (m, e))
    )
    if d > 1:  # of one feature only the sign would be left, and with it sums that are exactly 0
        x, y, teacher_x, teacher_y = (F.normalize(t, dim=1) for t in (x, y, teacher_x, teacher_y))
    return x.to(dtype), y.to(dtype), teacher_x.to(dtype), teacher_y.to(dtype)


def near(x: Tensor, y: Tensor, distance: float) -> Features:
    """A student that differs from the teacher `x`, `y` by about `distance`."""
    generator = torch.Generator().manual_seed(9)
    moved = [t + distance * torch.randn(t.shape, generator=generator) for t in (x, y)]
    return moved[0], moved[1], x, y


def dense(x, y, scale, teacher_x, teacher_y, teacher_scale, *, kind="kl"):
    """As users write it, with logits in float32 also for 16-bit features."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    student = scale * x.to(wide) @ y.to(wide).T
    teacher = teacher_scale * teacher_x.to(wide) @ teacher_y.to(wide).T
    total = 0
    for s, t in ((student, teacher), (student.T, teacher.T)):
        log_p, log_q = t.log_softmax(1), s.log_softmax(1)
        wanted = log_p - log_q if kind == "kl" else -log_q
        total = total + (log_p.exp() * wanted).sum(1).mean() / 2
    return total


def run(loss, given: Features, scale: float, teacher_scale: float, **options) -> dict[str, Tensor]:
    """The loss and all its gradients on fresh leaves."""
    x, y = (t.detach().clone().requires_grad_() for t in given[:2])
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = torch.tensor(scale, dtype=wide, requires_grad=True)
    value = loss(x, y, s, *given[2:], teacher_scale, **options)
    value.backward()
    return {"loss": value.detach(), "x": x.grad, "y": y.grad, "scale": s.grad}


def truth(given: Features, scale: float, teacher_scale: float, **options) -> dict[str, Tensor]:
    scales = (torch.tensor(s).item() for s in (scale, teacher_scale))  # as float32 has them
    return run(dense, tuple(t.double() for t in given), *scales, **options)
