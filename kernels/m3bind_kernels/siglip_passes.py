"""siglip: the three operators, what they run band by band and wave by wave."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from m3bind_kernels import hopper
from m3bind_kernels.configs import Config
from m3bind_kernels.launch import Inputs
from m3bind_kernels.siglip import siglip_kernel
from m3bind_kernels.tuning import choose
from m3bind_kernels.upstream import LARGEST_EXPONENT, factor_for
from m3bind_kernels.waves import Boost, Gradients, rescale_kernel

# Partial sums of one band of rows, where no derivatives are formed.
PART_BYTES = 64 << 20


def siglip_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    row_class: Tensor | None,  # [N] int32
    col_class: Tensor | None,  # [M] int32
    row_mask: Tensor | None,  # [N] int32
    col_mask: Tensor | None,  # [M] int32
    native: bool = False,
) -> Tensor:  # [N] float64
    """The sum of each row's losses. What enters them is told by `m3bind.ops.siglip`."""
    inputs = _inputs(x, y, logit_scale, row_class, col_class, row_mask, col_mask, native)
    num_rows, num_cols = inputs.shape
    found = x.new_zeros(num_rows, dtype=torch.float64)
    if num_rows == 0 or num_cols == 0:
        return found
    logits = _logits(inputs, logit_bias)

    def partial(part: Inputs, config: Config) -> Tensor:
        losses = _losses(part, config)
        siglip_kernel(part, logits, config, losses=losses)
        return losses

    with torch.cuda.device_of(x):
        config = hopper.TILE if inputs.native else choose("siglip_loss", inputs, partial)
        block = hopper.rows_of_block(config)
        step = PART_BYTES // (4 * triton.cdiv(num_cols, config.block_n)) // block
        step = max(1, step) * block
        for i in range(0, num_rows, step):
            band = slice(i, min(i + step, num_rows))
            found[band] = partial(inputs.rows(band), config).sum(0, dtype=torch.float64)
    return found


def siglip_bwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    row_class: Tensor | None,  # [N] int32
    col_class: Tensor | None,  # [M] int32
    row_mask: Tensor | None,  # [N] int32
    col_mask: Tensor | None,  # [M] int32
    grad_rows: Tensor,  # [N]
    need_x: bool,
    need_y: bool,
    native: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N, D], [M, D], [] float32, [] float32
    """Gradients for a weight of each row; one that is not needed comes back empty, [0, D]."""
    inputs = _inputs(x, y, logit_scale, row_class, col_class, row_mask, col_mask, native)
    grads = Gradients(inputs, need_x, need_y, x.dtype)
    by_bias = by_scale = inputs.scale.new_zeros(())
    if 0 not in inputs.shape:
        upstream = grad_rows.detach().double()
        factor = factor_for(upstream.abs().nan_to_num(0, 0, 0).amax())
        weights = (upstream * factor).float()
        with torch.cuda.device_of(x):
            _, by_bias, by_scale = _fill(grads, _logits(inputs, logit_bias), weights, factor, False)
    return grads.x, grads.y.to(y.dtype), by_scale.float(), by_bias.float()


def siglip_total_fwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    row_class: Tensor | None,  # [N] int32
    col_class: Tensor | None,  # [M] int32
    row_mask: Tensor | None,  # [N] int32
    col_mask: Tensor | None,  # [M] int32
    mean: bool,
    need_x: bool,
    need_y: bool,
    native: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # [], [N, D], [M, D], [], [], all float32
    """The sum of all losses (or that through N), and its gradients."""
    inputs = _inputs(x, y, logit_scale, row_class, col_class, row_mask, col_mask, native)
    grads = Gradients(inputs, need_x, need_y, torch.float32)
    total = by_bias = by_scale = inputs.scale.new_zeros(())
    if 0 not in inputs.shape:
        factor = torch.full_like(inputs.scale, 2.0**LARGEST_EXPONENT)
        weights = inputs.x.new_full((len(x),), 2.0**LARGEST_EXPONENT, dtype=torch.float32)
        if mean:
            factor = factor * len(x)
        with torch.cuda.device_of(x):
            total, by_bias, by_scale = _fill(
                grads, _logits(inputs, logit_bias), weights, factor, True
            )
    if mean:
        total = total / x.shape[0]
    return total.float(), grads.x, grads.y, by_scale.float(), by_bias.float()


def _inputs(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    row_class: Tensor | None,
    col_class: Tensor | None,
    row_mask: Tensor | None,
    col_mask: Tensor | None,
    native: bool,
) -> Inputs:
    """No classes mean that row i and column i are positive, and neither has another."""
    if row_class is None or col_class is None:
        count = max(len(x), len(y))
        classes = torch.arange(3, 4 * count + 3, 4, device=x.device, dtype=torch.int32)
        row_class, col_class = classes[: len(x)], classes[: len(y)]
    return Inputs.of(
        x, y, logit_scale, row_class, col_class, row_mask, col_mask, 0.0, False, native
    )


def _logits(inputs: Inputs, logit_bias: Tensor) -> Tensor:  # [2] float32
    return torch.stack([inputs.scale, logit_bias.detach().reshape(()).to(inputs.scale)]).float()


def _losses(part: Inputs, config: Config) -> Tensor:  # [tiles_m, N]
    num_rows, num_cols = part.shape
    tiles_m = triton.cdiv(num_cols, config.block_n)
    return part.x.new_empty((tiles_m, num_rows), dtype=torch.float32)


@dataclass(kw_only=True, slots=True)
class _Wave:
    """Some rows' derivatives and what is summed up beside them."""

    part: Inputs
    out: Tensor  # [N, M]
    losses: Tensor | None  # [tiles_m, N]
    sums: Tensor  # [3, tiles]
    weights: Tensor  # [N]
    lone: Tensor | None  # [N]

    def form(self, logits: Tensor, config: Config, boost: Tensor, wanted: Tensor) -> None:
        siglip_kernel(
            self.part, logits, config, losses=self.losses, weights=self.weights, boost=boost,
            wanted=wanted, out=self.out, lone=self.lone, sums=self.sums,
        )  # fmt: skip


def _fill(
    grads: Gradients, logits: Tensor, weights: Tensor, factor: Tensor, with_losses: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills the gradients of the features. Returns the sum of the losses and the gradients of bias
    and scale, [] float64: those of rows of these `weights` [N], through `factor`."""
    inputs = grads.inputs
    boost = Boost(inputs.x)
    lone = torch.empty_like(weights) if grads.apart else None

    def first(band: slice, out: Tensor, config: Config) -> _Wave:
        part = inputs.rows(band)
        losses = _losses(part, config)
        tiles = losses.shape[0] * triton.cdiv(part.shape[0], config.block_m)
        wave = _Wave(
            part=part, out=out, losses=losses if with_losses else None,
            sums=weights.new_empty((3, tiles)), weights=weights[band],
            lone=None if lone is None else lone[band],
        )  # fmt: skip
        wave.form(logits, config, boost.one, boost.always)
        return wave

    def first_wave(_: Inputs, config: Config) -> None:
        first(*grads.waves(config)[0], config)

    rounded = inputs.native and not grads.precise
    config = hopper.TILE if rounded else choose("siglip", inputs, first_wave)
    total, sums = inputs.scale.new_zeros(()), []
    back = inputs.scale / factor
    for band, out in grads.waves(config):
        wave = first(band, out, config)
        if not grads.precise:
            again, ratio = boost.after(wave.sums[2])
            wave.form(logits, config, boost.factor, again)
            rescale_kernel(grads.y, ratio)
        if wave.losses is not None:
            total = total + wave.losses.sum(dtype=torch.float64)
        sums.append(wave.sums[:2].sum(1, dtype=torch.float64))
        grads.add(
            band, out, back / boost.factor, None if wave.lone is None else wave.lone * boost.factor
        )
    if lone is not None and grads.col_partner is not None:
        lone = lone[grads.col_partner.clamp(min=0)] * boost.factor
    grads.finish(back / boost.factor, lone)
    by_bias, by_scale = torch.stack(sums).sum(0) / factor
    return total, by_bias, by_scale
