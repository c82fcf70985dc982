"""Emulated blocks in the place of the kernels of m3bind._C_cuda, on the CPU."""

import ctypes
import itertools

import pytest
import torch
from emulator import (
    Numbers,
    Siglip,
    Sizes,
    StatsBwd,
    StatsFwd,
    Topk,
    flags,
    library,
    pointer,
)

from m3bind_kernels import hopper

NAMES = [name for name, _ in Numbers._fields_]
SEEDS = itertools.count()


@pytest.fixture(scope="module")
def calls():
    """How often each kernel was started; they stand in for those of m3bind._C_cuda."""
    kernels = library()
    found = {"stats_fwd": 0, "stats_bwd": 0, "siglip": 0, "topk": 0}
    schemas = torch.library.Library("m3bind_hopper", "FRAGMENT")
    given = "Tensor x, Tensor y, Tensor factor, " + ", ".join(f"Tensor? {n}" for n in NAMES)
    given += ", float margin, bool totals"
    schemas.define(
        f"stats_fwd({given}, Tensor(a!) row_parts, Tensor(b!) col_parts, Tensor(c!) far, "
        "Tensor(d!)? powers, Tensor(e!)? shifts, Tensor(f!)? kept_row_sums, "
        "Tensor(g!)? kept_col_sums) -> ()"
    )
    schemas.define(
        f"stats_bwd({given}, bool apart, Tensor row_shift_ranges, Tensor col_shift_ranges, "
        "Tensor row_vectors, Tensor col_vectors, Tensor(a!) out, Tensor(b!) scale_parts, "
        "Tensor(c!) row_lost, Tensor(d!) col_lost) -> ()"
    )
    numbers_given = ", ".join(f"Tensor? {n}" for n in NAMES)
    schemas.define(
        f"siglip(Tensor x, Tensor y, Tensor logits, {numbers_given}, Tensor(a!)? losses, "
        "Tensor? weights, Tensor? boost, Tensor? wanted, Tensor(b!)? out, Tensor(c!)? lone, "
        "Tensor(d!)? sums) -> ()"
    )
    schemas.define(
        "topk(Tensor x, Tensor y, Tensor? row_mask, Tensor? col_mask, Tensor? row_mask_ranges, "
        "Tensor? col_mask_ranges, Tensor(a!) keys, int tiles_a_part, int k, int many) -> ()"
    )

    def start(name, x, y, chosen, p, *more, blocks=3) -> None:
        assert x.is_contiguous() and y.is_contiguous() and x.data_ptr() % 16 == 0
        getattr(kernels, f"emulate_{name}")(
            ctypes.c_bool(x.dtype == torch.bfloat16), flags(*chosen), pointer(x), pointer(y),
            *more, ctypes.byref(p), blocks, ctypes.c_uint64(next(SEEDS)),
        )  # fmt: skip
        found[name] += 1

    def common(x, y, factor, *rest):
        numbers = dict(zip(NAMES, rest[:8], strict=True))
        margin, totals = rest[8:10]
        fields = {
            "sizes": Sizes(rows=x.shape[0], cols=y.shape[0], features=x.shape[1]),
            "numbers": Numbers(**numbers), "factor": factor, "margin": margin,
        }  # fmt: skip
        present = numbers["row_class"] is not None, numbers["row_mask"] is not None, totals
        return fields, present, rest[10:]

    def forward(x, y, factor, *rest):
        fields, present, more = common(x, y, factor, *rest)
        row_parts, col_parts, far, powers, shifts, row_sums, col_sums = more
        keep = powers is not None
        p = StatsFwd(
            **fields, row_parts=row_parts, col_parts=col_parts, row_plane=row_parts.stride(0),
            col_plane=col_parts.stride(0), far=far, kept_rows=len(powers) if keep else 0,
            shifts=shifts, kept_row_sums=row_sums, kept_col_sums=col_sums,
            kept_row_stride=row_sums.stride(1) if keep else 0,
            kept_row_plane=row_sums.stride(0) if keep else 0,
            kept_col_plane=col_sums.stride(0) if keep else 0,
        )  # fmt: skip
        out = powers if keep else x
        start("stats_fwd", x, y, (*present, keep), p, pointer(out), out.stride(0))

    def backward(x, y, factor, *rest):
        fields, present, more = common(x, y, factor, *rest)
        apart, row_ranges, col_ranges, rows, cols, out, scale_parts, row_lost, col_lost = more
        assert out.data_ptr() % 16 == 0 and out.stride(0) % 8 == 0
        p = StatsBwd(
            **fields, row_shift_ranges=row_ranges, col_shift_ranges=col_ranges, row_vectors=rows,
            col_vectors=cols, row_stride=rows.stride(0), col_stride=cols.stride(0),
            scale_parts=scale_parts, row_lost=row_lost, col_lost=col_lost,
        )  # fmt: skip
        start("stats_bwd", x, y, (*present, apart), p, pointer(out), out.stride(0))

    def siglip(x, y, logits, *rest):
        numbers = dict(zip(NAMES, rest[:8], strict=True))
        losses, weights, boost, wanted, out, lone, sums = rest[8:]
        p = Siglip(
            sizes=Sizes(rows=x.shape[0], cols=y.shape[0], features=x.shape[1]),
            numbers=Numbers(**numbers), logits=logits, losses=losses, weights=weights, boost=boost,
            wanted=wanted, lone=lone, sums=sums, plane=0 if sums is None else sums.stride(0),
        )  # fmt: skip
        chosen = [t is not None for t in (numbers["row_mask"], losses, out, lone)]
        there = x if out is None else out
        start("siglip", x, y, chosen, p, pointer(there), there.stride(0))

    def topk(x, y, row_mask, col_mask, row_ranges, col_ranges, keys, tiles_a_part, k, many):
        _, parts, space = keys.shape
        p = Topk(
            sizes=Sizes(rows=x.shape[0], cols=y.shape[0], features=x.shape[1]),
            numbers=Numbers(
                row_mask=row_mask, col_mask=col_mask, row_mask_ranges=row_ranges,
                col_mask_ranges=col_ranges,
            ), keys=keys, num_parts=parts, tiles_a_part=tiles_a_part, k=k, many=many,
            capacity=space,
        )  # fmt: skip
        assert keys.is_contiguous() and space <= hopper.MOST_CANDIDATES
        start("topk", x, y, [row_mask is not None], p)

    schemas.impl("topk", topk, "CPU")
    schemas.impl("siglip", siglip, "CPU")
    schemas.impl("stats_fwd", forward, "CPU")
    schemas.impl("stats_bwd", backward, "CPU")
    yield found
    schemas._destroy()
