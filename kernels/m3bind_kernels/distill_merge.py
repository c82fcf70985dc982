"""Adds the partial sums of similarity_distill's tiles up, in float64 and in the order of tiles."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3bind_kernels.divergence import load_sums, moved, store_sums
from m3bind_kernels.merge import BLOCK_ENTRIES, BLOCK_PARTS

PLANES = 6
LN_2 = math.log(2)


@triton.jit
def _distill_merge_kernel(
    parts,  # [6, num_parts, num_entries] float32, as `store_sums` stores them
    state,  # [6, state_stride] float64: the same of what came before
    num_parts, num_entries, plane, state_stride,  # plane: of `parts`, num_parts * num_entries
    KL: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_ENTRIES: tl.constexpr,
):  # fmt: skip
    entries = tl.program_id(0).to(tl.int64) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    inside = entries < num_entries
    shift_s, shift_t, student, teacher, change, cross = load_sums(
        state + entries, state_stride, inside
    )
    for first in range(0, num_parts, BLOCK_PARTS):
        at = first + tl.arange(0, BLOCK_PARTS)
        mask = (at < num_parts)[:, None] & inside[None, :]
        pointers = parts + at.to(tl.int64)[:, None] * num_entries + entries[None, :]
        shifts_s, shifts_t, students, teachers, changes, crosses = load_sums(pointers, plane, mask)
        top_s = tl.maximum(shift_s, tl.max(shifts_s, 0))
        top_t = tl.maximum(shift_t, tl.max(shifts_t, 0))
        student, teacher, change, cross = moved(
            shift_s, shift_t, student, teacher, change, cross, top_s, top_t, KL
        )
        students, teachers, changes, crosses = moved(
            shifts_s, shifts_t, students, teachers, changes, crosses,
            top_s[None, :], top_t[None, :], KL,
        )  # fmt: skip
        student += tl.sum(students, 0)
        teacher += tl.sum(teachers, 0)
        change += tl.sum(changes, 0)
        cross += tl.sum(crosses, 0)
        shift_s, shift_t = top_s, top_t
    store_sums(
        state + entries, state_stride, inside, shift_s, shift_t, student, teacher, change, cross
    )


def empty_divergences(like: Tensor, count: int) -> Tensor:
    """What `distill_merge_kernel` adds to: nothing yet."""
    state = like.new_zeros((PLANES, count), dtype=torch.float64)
    state[:2] = -torch.inf
    return state


def distill_merge_kernel(parts: Tensor, state: Tensor, kl: bool) -> None:
    """Adds parts [6, P, L] to a state [6, L] (of any row stride), in place."""
    num_parts, num_entries = parts.shape[1:]
    _distill_merge_kernel[(triton.cdiv(num_entries, BLOCK_ENTRIES),)](
        parts, state, num_parts, num_entries, parts.stride(0), state.stride(0), KL=kl,
        BLOCK_PARTS=BLOCK_PARTS, BLOCK_ENTRIES=BLOCK_ENTRIES, num_warps=4,
    )  # fmt: skip


def divergences(state: Tensor, kl: bool) -> tuple[Tensor, Tensor]:  # [L], [2, L] float64
    """The divergences, and the log-sum-exps of student and teacher, in natural logarithms."""
    shift_s, shift_t, student, teacher, change, cross = state
    change = change / teacher
    # log(student / teacher), to the last digit also where both are nearly equal.
    apart = change.log1p().where(change.abs() < 0.5, (student / teacher).log())
    loss = cross / teacher * LN_2 + (apart if kl else student.log())
    lse_t = teacher.log() + shift_t * LN_2
    # Where everything is masked, apart is 0 / 0.
    log_s = (teacher.log() + apart).where(teacher > 0, student.log())
    return loss, torch.stack([log_s + shift_s * LN_2, lse_t])
