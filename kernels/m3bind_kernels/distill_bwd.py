"""similarity_distill, backward: gradients of the student's features and scale.

In waves of rows: a kernel forms the logits of student and teacher again and stores the derivative
by the student's dot products, of which `waves` makes gradients.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.configs import Config
from m3bind_kernels.distill_merge import LN_2
from m3bind_kernels.distill_sides import Sides
from m3bind_kernels.divergence import difference, pairs_left_out
from m3bind_kernels.launch import Inputs, block_ranges, launch
from m3bind_kernels.tiles import dot_products, is_special, pieces_of, tile_at
from m3bind_kernels.tuning import choose
from m3bind_kernels.upstream import LARGEST_EXPONENT
from m3bind_kernels.waves import Boost, Gradients, rescale_kernel


@triton.jit
def _load_weights(vectors, at, stride, mask):
    """Of `_Weights`: shifts of student and teacher; weights of the difference, of the two alone."""
    return (
        tl.load(vectors + at, mask=mask, other=0.0),
        tl.load(vectors + stride + at, mask=mask, other=0.0),
        tl.load(vectors + 2 * stride + at, mask=mask, other=0.0),
        tl.load(vectors + 3 * stride + at, mask=mask, other=0.0),
        tl.load(vectors + 4 * stride + at, mask=mask, other=0.0),
    )


@triton.jit
def _shares(student, teacher, apart, alone_s, alone_t):
    """weight * (student's softmax - teacher's softmax) of shifted logits."""
    e_s, e_t = tl.exp2(student), tl.exp2(teacher)
    return difference(e_s, e_t, student - teacher) * apart + e_s * alone_s + e_t * alone_t


@triton.jit
def _distill_bwd_kernel(
    x, y, teacher_x, teacher_y,  # pointers [N, D], [M, D], [N, E], [M, E]
    factors,  # [2] float32: logits in base 2 are factor * dot
    row_mask, col_mask, row_mask_ranges, col_mask_ranges,  # [N], [M], [tiles, 2] int32
    row_shift_ranges, col_shift_ranges,  # [tiles, 2] float32
    row_vectors, col_vectors,  # [5, N], [5, M] float32
    boost, wanted,  # [1] float32, by which derivatives are multiplied; [1] int32, 0: do nothing
    out,  # [N, M] derivatives by the student's dot products
    sums,  # [2, tiles] float32: derivatives * dots; largest derivative
    num_rows, num_cols, num_features, teacher_features, row_stride, col_stride, out_stride, plane,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PIECE: tl.constexpr, HAS_MASKS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    STORE_BY_DESCRIPTOR: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    if DESCRIPTORS:
        x_tiles = tl.make_tensor_descriptor(
            x, [num_rows, num_features], [num_features, 1], [BLOCK_M, BLOCK_K]
        )
        y_tiles = tl.make_tensor_descriptor(
            y, [num_cols, num_features], [num_features, 1], [BLOCK_N, BLOCK_K]
        )
        teacher_x_tiles = tl.make_tensor_descriptor(
            teacher_x, [num_rows, teacher_features], [teacher_features, 1], [BLOCK_M, BLOCK_K]
        )
        teacher_y_tiles = tl.make_tensor_descriptor(
            teacher_y, [num_cols, teacher_features], [teacher_features, 1], [BLOCK_N, BLOCK_K]
        )
    else:
        x_tiles, y_tiles, teacher_x_tiles, teacher_y_tiles = x, y, teacher_x, teacher_y
    if STORE_BY_DESCRIPTOR:
        out_tiles = tl.make_tensor_descriptor(
            out, [num_rows, num_cols], [out_stride, 1], [BLOCK_M, PIECE]
        )
    tiles_n = tl.cdiv(num_rows, BLOCK_M)
    tiles_m = tl.cdiv(num_cols, BLOCK_N)
    factor, teacher_factor = tl.load(factors), tl.load(factors + 1)
    larger = tl.load(boost)
    last = tl.where(tl.load(wanted) == 0, 0, tiles_n * tiles_m)
    for tile in range(tl.program_id(0), last, tl.num_programs(0)):
        row_tile, col_tile = tile_at(tile, tiles_n, tiles_m, 8)
        first_row, first_col = row_tile * BLOCK_M, col_tile * BLOCK_N
        student = dot_products(
            x_tiles, y_tiles, first_row, first_col, num_rows, num_cols, num_features,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, INTERPRETED,
        )  # fmt: skip
        teacher = dot_products(
            teacher_x_tiles, teacher_y_tiles, first_row, first_col, num_rows, num_cols,
            teacher_features, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, DESCRIPTORS, INTERPRETED,
        )  # fmt: skip
        rows = first_row + tl.arange(0, BLOCK_M)
        row_s, row_t, row_apart, row_alone_s, row_alone_t = _load_weights(
            row_vectors, rows, row_stride, rows < num_rows
        )
        row_range = row_shift_ranges + 2 * row_tile
        col_range = col_shift_ranges + 2 * col_tile
        low = tl.minimum(tl.load(row_range), tl.load(col_range))
        high = tl.maximum(tl.load(row_range + 1), tl.load(col_range + 1))
        # As in stats_bwd: one exponential for student and teacher each, where all shifts are close.
        one_exponential = high - low <= 64.0
        special = is_special(
            row_mask_ranges, col_mask_ranges, row_mask_ranges, col_mask_ranges,
            row_tile, col_tile, num_rows, num_cols, BLOCK_M, BLOCK_N, False, HAS_MASKS,
        )  # fmt: skip
        by_scale = tl.zeros([BLOCK_M], tl.float32)
        largest = tl.zeros([BLOCK_M], tl.float32)
        student_pieces = pieces_of(student, BLOCK_M, BLOCK_N, PIECE)
        teacher_pieces = pieces_of(teacher, BLOCK_M, BLOCK_N, PIECE)
        for p in tl.static_range(BLOCK_N // PIECE):
            cols = first_col + p * PIECE + tl.arange(0, PIECE)
            col_s, col_t, col_apart, col_alone_s, col_alone_t = _load_weights(
                col_vectors, cols, col_stride, cols < num_cols
            )
            logits = student_pieces[p] * factor
            aims = teacher_pieces[p] * teacher_factor
            if one_exponential:
                up_s, up_t = tl.exp2(high - row_s), tl.exp2(high - row_t)
                right_s, right_t = tl.exp2(high - col_s), tl.exp2(high - col_t)
                grad = _shares(
                    logits - high, aims - high,
                    (row_apart * up_s)[:, None] + (col_apart * right_s)[None, :],
                    (row_alone_s * up_s)[:, None] + (col_alone_s * right_s)[None, :],
                    (row_alone_t * up_t)[:, None] + (col_alone_t * right_t)[None, :],
                )  # fmt: skip
            else:
                grad = _shares(
                    logits - row_s[:, None], aims - row_t[:, None], row_apart[:, None],
                    row_alone_s[:, None], row_alone_t[:, None],
                )  # fmt: skip
                grad += _shares(
                    logits - col_s[None, :], aims - col_t[None, :], col_apart[None, :],
                    col_alone_s[None, :], col_alone_t[None, :],
                )  # fmt: skip
            if special:
                left_out = pairs_left_out(
                    row_mask, col_mask, rows, cols, num_rows, num_cols, HAS_MASKS
                )
                grad = tl.where(left_out, 0.0, grad)
            by_scale += tl.sum(grad * student_pieces[p], 1)
            largest = tl.maximum(largest, tl.max(tl.abs(grad), 1))
            rounded = (grad * larger).to(out.dtype.element_ty)
            if STORE_BY_DESCRIPTOR:
                out_tiles.store([first_row, first_col + p * PIECE], rounded)
            else:
                at = out + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
                inside = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
                tl.store(at, rounded, mask=inside)
        tl.store(sums + tile, tl.sum(by_scale, 0))
        tl.store(sums + plane + tile, tl.max(largest, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weights:
    """Of one direction, [5, L] float32: integer shifts above the log-sum-exps of student and
    teacher in base 2; weights of 2^(student's logit - shift) - 2^(teacher's - shift), and of each
    alone. The shift is one for both, and their difference is formed first, where they are close:
    then it has all its digits also where student and teacher nearly agree."""

    vectors: Tensor

    @staticmethod
    def of(lse: Tensor, grad: Tensor) -> "_Weights":  # [2, L], [L] float64
        nothing = lse == -torch.inf
        lse = (lse / LN_2).masked_fill(nothing, 0)
        shift = lse.ceil()
        close = (lse[0] - lse[1]).abs() <= 1
        shift = shift.amax(0).where(close, shift)
        student, teacher = (grad * torch.exp2(shift - lse)).masked_fill(nothing, 0)
        # Exactly 0 where the two are equal, which two calls of exp2 need not be.
        change = teacher * torch.expm1((lse[1] - lse[0]) * LN_2)
        alone_t = change.where(close, -teacher)
        vectors = [*shift, student.where(close, 0), student.where(~close, 0), alone_t]
        return _Weights(vectors=torch.stack(vectors).float())

    def rows(self, band: slice) -> "_Weights":
        return _Weights(vectors=self.vectors[:, band])

    def ranges(self, block: int) -> Tensor:  # [tiles, 2]
        """Smallest and largest shift of each block."""
        both = torch.stack([block_ranges(shift, block) for shift in self.vectors[:2]])
        return torch.stack([both[..., 0].amin(0), both[..., 1].amax(0)], 1)


def distill_bwd_kernel(
    part: Sides, rows: _Weights, cols: _Weights, ranges: list[Tensor], boost: Tensor,
    wanted: Tensor, out: Tensor, sums: Tensor, config: Config,
) -> None:  # fmt: skip
    """Fills `out` [N, M] with the derivatives of a band of rows, and `sums` [2, tiles]."""
    constants = part.constants(config)
    launch(
        _distill_bwd_kernel, config, *part.student.shape,
        *part.pointers(), *part.masks(config), *ranges, rows.vectors, cols.vectors, boost, wanted,
        out, sums, *part.sizes(), rows.vectors.stride(0), cols.vectors.stride(0), out.stride(0),
        sums.stride(0), STORE_BY_DESCRIPTOR=constants["DESCRIPTORS"] and out.dtype != torch.float32,
        **constants,
    )  # fmt: skip


def similarity_distill_bwd(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    logit_scale: Tensor,  # []
    teacher_x: Tensor,  # [N, E]
    teacher_y: Tensor,  # [M, E]
    teacher_scale: Tensor,  # []
    row_mask: Tensor | None,  # [N] int32
    col_mask: Tensor | None,  # [M] int32
    row_lse: Tensor,  # [2, N] float64
    col_lse: Tensor,  # [2, M] float64
    kept: Tensor,  # [2, 0, M]
    grad_rows: Tensor,  # [N]
    grad_cols: Tensor,  # [M]
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, D], [M, D], []
    """Gradients of x, y and the scale; one that is not needed comes back empty, [0, D]."""
    sides = Sides.of(
        x, y, logit_scale, teacher_x, teacher_y, teacher_scale, row_mask, col_mask
    )  # fmt: skip
    grads = Gradients(sides.student, need_x, need_y, x.dtype)
    by_scale = sides.student.scale.new_zeros(())
    if 0 not in sides.student.shape:
        upstream = [g.detach().double() for g in (grad_rows, grad_cols)]
        factor = _factor(upstream)
        rows, cols = (
            _Weights.of(lse.detach().double(), grad * factor)
            for lse, grad in zip((row_lse, col_lse), upstream, strict=True)
        )
        with torch.cuda.device_of(x):
            by_scale = _fill(grads, sides, rows, cols, factor)
    return grads.x, grads.y.to(y.dtype), by_scale.to(logit_scale.dtype)


def _factor(upstream: list[Tensor]) -> Tensor:
    """Brings derivatives below 2^14. With the mean's equal weights a share of 1 is then a power of
    two: rounded, the derivatives at the peaks of one-hot teachers would all err alike."""
    largest = torch.stack([g.abs().nan_to_num(0, 0, 0).amax() for g in upstream]).amax()
    return (2.0 ** (LARGEST_EXPONENT - 1) / largest).where(largest > 1e-290, 1)


def _fill(
    grads: Gradients, sides: Sides, rows: _Weights, cols: _Weights, factor: Tensor
) -> Tensor:  # [] float64
    """Fills the gradients of the features; returns that of the scale."""
    boost = Boost(sides.factors)

    def prepare(band: slice, config: Config) -> tuple[Sides, list[Tensor], Tensor]:
        """Some rows, the ranges of their shifts and the columns', memory for their sums."""
        part = rows.rows(band)
        ranges = [part.ranges(config.block_m), cols.ranges(config.block_n)]
        sums = rows.vectors.new_empty((2, ranges[0].shape[0] * ranges[1].shape[0]))
        return sides.rows(band), ranges, sums

    def attempt(_: Inputs, config: Config) -> None:
        config = sides.fitting(config)
        band, out = grads.waves(config)[0]
        part, ranges, sums = prepare(band, config)
        distill_bwd_kernel(
            part, rows.rows(band), cols, ranges, boost.one, boost.always, out, sums, config
        )

    config = sides.fitting(choose("distill_bwd", sides.student, attempt))
    back, by_scale = sides.student.scale / factor, []
    for band, out in grads.waves(config):
        part, ranges, sums = prepare(band, config)
        given = (part, rows.rows(band), cols, ranges)
        distill_bwd_kernel(*given, boost.one, boost.always, out, sums, config)
        if not grads.precise:
            again, ratio = boost.after(sums[1])
            distill_bwd_kernel(*given, boost.factor, again, out, sums, config)
            rescale_kernel(grads.y, ratio)
        by_scale.append(sums[0].sum(dtype=torch.float64))
        grads.add(band, out, back / boost.factor)
    grads.finish(back / boost.factor)
    return torch.stack(by_scale).sum() / factor
