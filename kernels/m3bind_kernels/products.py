"""Products of matrices by the library, with float32 results also of 16-bit matrices."""

import torch
from torch import Tensor


def _widened(a: Tensor) -> bool:
    """Whether torch has no 16-bit product with a float32 result there: CPU and ROCm."""
    return a.dtype != torch.float32 and (not a.is_cuda or torch.version.hip is not None)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    if _widened(a):
        return a.float() @ b.float()
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is float32."""
    if _widened(a):
        total.addmm_(a.float(), b.float())
    elif a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
