"""Products of matrices by the library, with float32 results also of 16-bit matrices."""

import torch
from torch import Tensor


def _widened(a: Tensor) -> bool:
    """Whether torch has no 16-bit product with a float32 result there: CPU and ROCm."""
    return a.dtype != torch.float32 and (not a.is_cuda or torch.version.hip is not None)


def as_float16(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features as float16, and the power of two [] float64 by which they have been multiplied.

    bfloat16's 8 digits are exact in it down to 2^-29 of the largest: derivatives can then be
    rounded to 11 digits instead of 8, so that this error vanishes behind the gradient's own.
    """
    one = torch.ones((), dtype=torch.float64, device=features.device)
    if features.dtype == torch.float16:
        return features, one
    largest = features.abs().nan_to_num_(0, 0, 0).amax().double()
    factor = torch.ldexp(one, 15 - torch.frexp(largest).exponent).where(largest > 0, 1)
    return (features * factor).half(), factor


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
