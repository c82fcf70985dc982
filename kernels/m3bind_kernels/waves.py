"""Gradients of features from derivatives by the dot products, which come in waves of rows.

Two library GEMMs make gradients of a wave, accumulated in float32. Where features are 16-bit its
derivatives are float16.
"""

import math
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.configs import Config
from m3bind_kernels.hopper import rows_of_block
from m3bind_kernels.launch import Inputs
from m3bind_kernels.products import add_product, as_float16, product
from m3bind_kernels.upstream import LARGEST_EXPONENT, add_partners, partners

# Derivatives of one wave. The float32 gradient of y is read and written once a wave, so a wave that
# stays in L2 costs more than it saves where it has few rows.
WAVE_BYTES = 128 << 20
WAVE_ROWS = 1024
# Up to this many pairs the derivatives stay float32: the time is that of the launches anyway, and
# few pairs do not average the rounding to 16 bit out.
PRECISE_PAIRS = 1 << 20


def is_precise(inputs: Inputs) -> bool:
    """Whether derivatives stay float32."""
    return inputs.x.dtype == torch.float32 or math.prod(inputs.shape) <= PRECISE_PAIRS


class Gradients:
    """Gradients of x and y: no rows where they are not needed."""

    def __init__(self, inputs: Inputs, need_x: bool, need_y: bool, x_dtype: torch.dtype) -> None:
        x, y = inputs.x, inputs.y
        self.inputs = inputs
        self.x = x.new_zeros((x.shape[0] if need_x else 0, x.shape[1]), dtype=x_dtype)
        self.y = y.new_zeros((y.shape[0] if need_y else 0, y.shape[1]), dtype=torch.float32)
        self.precise = is_precise(inputs)
        self.row_partner = self.col_partner = None
        if self.precise:
            self.other_x, self.other_y = x.float(), y.float()
            self.factor_x = self.factor_y = torch.ones_like(inputs.scale)
            return
        self.other_x, self.factor_x = as_float16(x)
        self.other_y, self.factor_y = as_float16(y)
        if x.dtype == torch.float16:
            # Rounded like the gradient itself, the largest derivatives would be most of its error.
            self.row_partner = partners(inputs.row_class, inputs.col_class)
            self.col_partner = partners(inputs.col_class, inputs.row_class)

    @property
    def apart(self) -> bool:
        """Whether the derivatives at pairs that are alone in their class are left out of waves."""
        return self.row_partner is not None

    def waves(self, config: Config) -> list[tuple[slice, Tensor]]:
        """Bands of rows, and the buffer for the derivatives of each: the same memory every time."""
        num_rows, num_cols = self.inputs.shape
        stride = triton.cdiv(num_cols, 16) * 16  # so that rows are aligned for wide stores
        dtype = self.other_x.dtype
        fitting = WAVE_BYTES // (stride * dtype.itemsize)
        block = rows_of_block(config)
        step = max(fitting, WAVE_ROWS, block) // block * block
        buffer = self.inputs.x.new_empty((min(step, num_rows), stride), dtype=dtype)
        return [
            (slice(i, end), buffer[: end - i, :num_cols])
            for i in range(0, num_rows, step)
            for end in (min(i + step, num_rows),)
        ]

    def add(
        self, band: slice, wave: Tensor, back: Tensor, lone: Tensor | None = None,
        lost: Tensor | None = None,
    ) -> None:  # fmt: skip
        """A wave's products. `back` [] float64 turns derivatives into those by the features; `lone`
        [rows of the band] are those at the partners, where they are apart, and `lost` [rows of the
        band] is what rounding took from the rows' sums."""
        if self.x.shape[0] > 0:
            self.set_rows(band, product(wave, self.other_y), back, lone, lost)
        if self.y.shape[0] > 0:
            add_product(self.y, wave.T, self.other_x[band])

    def set_rows(
        self, band: slice, sums: Tensor, back: Tensor, lone: Tensor | None = None,
        lost: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The gradient of some rows of x, from their sums of derivative * other_y."""
        if lost is not None and not self.precise:
            sums.addr_(lost, self.mean_y)
        if self.row_partner is not None and lone is not None:
            add_partners(sums, self.row_partner[band], lone, self.inputs.y)
        self.x[band] = sums.mul_(back / self.factor_y)

    def finish(self, back: Tensor, lone: Tensor | None = None, lost: Tensor | None = None) -> None:
        """Makes the gradient of y of the sum of all products; `lone` and `lost` [M]."""
        if self.y.shape[0] > 0:
            if lost is not None and not self.precise:
                self.y.addr_(lost, self.mean_x)
            if self.col_partner is not None and lone is not None:
                add_partners(self.y, self.col_partner, lone, self.inputs.x)
            self.y.mul_(back / self.factor_x)

    # What rounding takes from a sum of derivatives goes to the features' mean: derivatives that sum
    # up to 0 cancel what features have in common, and their rounding would not.

    @cached_property
    def mean_x(self) -> Tensor:
        return self.other_x.mean(0, dtype=torch.float32)

    @cached_property
    def mean_y(self) -> Tensor:
        return self.other_y.mean(0, dtype=torch.float32)


@triton.jit
def _rescale_kernel(total, ratio, count, BLOCK: tl.constexpr):
    by = tl.load(ratio)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        found = tl.load(total + at, mask=at < count, other=0.0)
        tl.store(total + at, found * by, mask=at < count)


def rescale_kernel(total: Tensor, ratio: Tensor) -> None:
    """total *= ratio [1] float32, which costs a launch and nothing else where it is 1."""
    if total.numel() > 0:
        _rescale_kernel[(triton.cdiv(total.numel(), 4096),)](
            total, ratio, total.numel(), BLOCK=4096, num_warps=4
        )


class Boost:
    """By which power of two derivatives are multiplied before they are rounded to float16.

    It is 1, unless all derivatives so far are so small that float16 would lose them: a batch that
    is nearly separated, a student close to its teacher. Their size is known when a wave has been
    formed, and then that wave is formed again, by a kernel that otherwise returns at once: no value
    comes to the host. As the largest derivative so far never falls, the boost never rises.
    """

    # What is 17 binary digits below a largest derivative of 2^3 is still normal in float16.
    ENOUGH = LARGEST_EXPONENT - 10

    def __init__(self, like: Tensor) -> None:
        self.one = like.new_ones(1, dtype=torch.float32)
        self.always = like.new_ones(1, dtype=torch.int32)
        self.factor = self.one
        self.largest = torch.zeros_like(self.one)

    def after(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the largest derivatives of the wave's tiles into account. Whether the wave must be
        formed again [1] int32, and what earlier sums must be multiplied by [1] float32."""
        self.largest = torch.maximum(self.largest, largest.amax())
        exponent = torch.frexp(self.largest).exponent
        boosted = torch.ldexp(self.one, (LARGEST_EXPONENT - exponent).clamp(max=100))
        small = (exponent < self.ENOUGH) & (self.largest > 0)
        before, self.factor = self.factor, boosted.where(small, 1)
        return (self.factor != 1).int(), self.factor / before
