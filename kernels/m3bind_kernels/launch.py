"""What both passes do before a kernel starts: inputs as kernels want them, grids, descriptors."""

import contextvars
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from m3bind_kernels import hopper
from m3bind_kernels.configs import INTERPRETED, Config, SideConfig, multiprocessors
from m3bind_kernels.tiles import _ranges_kernel

LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The inputs of similarity_stats, contiguous and checked."""

    x: Tensor  # [N, D]
    y: Tensor  # [M, D]
    scale: Tensor  # [] float64
    factor: Tensor  # [1] float32: scale * log2(e)
    row_class: Tensor | None
    col_class: Tensor | None
    row_mask: Tensor | None
    col_mask: Tensor | None
    margin: float
    totals: bool
    native: bool  # whether tiles are for the kernels of csrc/cuda

    @staticmethod
    def of(
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        row_class: Tensor | None,
        col_class: Tensor | None,
        row_mask: Tensor | None,
        col_mask: Tensor | None,
        margin: float,
        totals: bool,
        native: bool = False,
    ) -> "Inputs":
        assert (row_class is None) == (col_class is None)
        assert (row_mask is None) == (col_mask is None)
        scale = logit_scale.detach().reshape(()).to(device=x.device, dtype=torch.float64)
        found = Inputs(
            x=x.detach().contiguous(), y=y.detach().contiguous(), scale=scale,
            factor=(scale * LOG2_E).float().reshape(1), row_class=_whole(row_class),
            col_class=_whole(col_class), row_mask=_whole(row_mask), col_mask=_whole(col_mask),
            margin=margin, totals=totals, native=False,
        )  # fmt: skip
        if not (native and hopper.runs_on(x.device) and rows_fit(found) and x.shape[1] > 0):
            return found
        x, y = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (found.x, found.y))
        return replace(found, x=x, y=y, native=True)

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.y.shape[0]

    def rows(self, band: slice) -> "Inputs":
        """The same with some rows only."""
        return replace(
            self, x=self.x[band],
            row_class=None if self.row_class is None else self.row_class[band],
            row_mask=None if self.row_mask is None else self.row_mask[band],
        )  # fmt: skip

    def numbers(self) -> tuple[Tensor | None, ...]:
        return self.row_class, self.col_class, self.row_mask, self.col_mask

    def ranges(self, config: Config | SideConfig) -> list[Tensor | None]:
        """Extremes of the classes and masks of every block of rows and columns."""
        blocks = (config.block_m, config.block_n) * 2
        return [
            None if values is None else block_ranges(values, block)
            for values, block in zip(self.numbers(), blocks, strict=True)
        ]

    def constants(self, config: Config) -> dict[str, bool]:
        return {
            "EVEN_K": self.x.shape[1] % config.block_k == 0,
            "HAS_MASKS": self.row_mask is not None,
            "DESCRIPTORS": descriptors_fit(self),
            "INTERPRETED": INTERPRETED,
        }

    def nats(self) -> Tensor:
        """What a logarithm in the kernels' base is in natural ones. The factor was rounded to
        float32: logits in base 2 times this are `scale * dot` again, to the last bits."""
        exact = self.scale / self.factor.double().reshape(())
        return exact.where(self.factor.reshape(()) != 0, 1 / LOG2_E)


def _whole(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.int().contiguous()


def block_ranges(values: Tensor, block: int) -> Tensor:
    """Smallest and largest value of each block, [blocks, 2]; integers below 0 equal nothing and do
    not count as smallest."""
    num_blocks = triton.cdiv(values.shape[0], block)
    out = values.new_empty((num_blocks, 2))
    _ranges_kernel[(num_blocks,)](
        values, out, values.shape[0], SKIP_NEGATIVE=not values.is_floating_point(), BLOCK=block
    )
    return out


def can_describe(device: torch.device) -> bool:
    """Whether Triton's tensor descriptors are hardware there (or interpreted, to test them)."""
    if device.type == "cpu":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def rows_fit(inputs: Inputs) -> bool:
    """Whether features are 16-bit, in rows of whole 16 bytes."""
    return inputs.x.dtype != torch.float32 and inputs.x.shape[1] % 8 == 0


def descriptors_fit(inputs: Inputs) -> bool:
    """Whether the features can be read by descriptors."""
    x, y = inputs.x, inputs.y
    aligned = x.data_ptr() % 16 == 0 and y.data_ptr() % 16 == 0
    return rows_fit(inputs) and aligned and can_describe(x.device)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch(
    kernel: Any, config: Config, num_rows: int, num_cols: int, *args: Any, **constants: Any
) -> None:
    """Starts a persistent kernel over the tiles of num_rows x num_cols."""
    tiles = triton.cdiv(num_rows, config.block_m) * triton.cdiv(num_cols, config.block_n)
    programs = min(tiles, multiprocessors(args[0].device) * config.programs)
    start(kernel, config, programs, *args, **constants)


def start(kernel: Any, config: Config, programs: int, *args: Any, **constants: Any) -> None:
    """Starts so many programs of a kernel over tiles."""

    def run() -> None:
        if constants["DESCRIPTORS"] and not INTERPRETED:
            triton.set_allocator(_scratch)
        kernel[(programs,)](
            *args, **constants, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, PIECE=config.piece, num_warps=config.num_warps,
            num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    with torch.cuda.device_of(args[0]):
        # In a context of its own: the caller's allocator stays as it was.
        contextvars.copy_context().run(run)
