"""The kernels of csrc/cuda on emulated blocks: built by the host's compiler, called by ctypes."""

import ctypes
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"
TILE_ROWS, TILE_COLS = 64, 256


class Struct(ctypes.Structure):
    """Fields by name; tensors become pointers, None null."""

    def __init__(self, **values) -> None:
        self.held = values
        found = {n: v.data_ptr() if isinstance(v, Tensor) else v for n, v in values.items()}
        super().__init__(**found)


POINTER = ctypes.c_void_p


class Sizes(Struct):
    _fields_ = [(name, ctypes.c_int) for name in ("rows", "cols", "features")]


class Numbers(Struct):
    _fields_ = [
        (side + kind + what, POINTER)
        for what in ("", "_ranges")
        for kind in ("class", "mask")
        for side in ("row_", "col_")
    ]


class StatsFwd(Struct):
    _fields_ = [
        ("sizes", Sizes), ("numbers", Numbers), ("factor", POINTER), ("margin", ctypes.c_float),
        ("row_parts", POINTER), ("col_parts", POINTER), ("row_plane", ctypes.c_int64),
        ("col_plane", ctypes.c_int64), ("far", POINTER), ("kept_rows", ctypes.c_int),
        ("shifts", POINTER), ("kept_row_sums", POINTER), ("kept_col_sums", POINTER),
        ("kept_row_stride", ctypes.c_int64), ("kept_row_plane", ctypes.c_int64),
        ("kept_col_plane", ctypes.c_int64),
    ]  # fmt: skip


class StatsBwd(Struct):
    _fields_ = [
        ("sizes", Sizes), ("numbers", Numbers), ("factor", POINTER), ("margin", ctypes.c_float),
        ("row_shift_ranges", POINTER), ("col_shift_ranges", POINTER), ("row_vectors", POINTER),
        ("col_vectors", POINTER), ("row_stride", ctypes.c_int64), ("col_stride", ctypes.c_int64),
        ("scale_parts", POINTER), ("row_lost", POINTER), ("col_lost", POINTER),
    ]  # fmt: skip


class Siglip(Struct):
    _fields_ = [
        ("sizes", Sizes), ("numbers", Numbers), ("logits", POINTER), ("losses", POINTER),
        ("weights", POINTER), ("boost", POINTER), ("wanted", POINTER), ("lone", POINTER),
        ("sums", POINTER), ("plane", ctypes.c_int64),
    ]  # fmt: skip


class Topk(Struct):
    _fields_ = [
        ("sizes", Sizes), ("numbers", Numbers), ("keys", POINTER), ("num_parts", ctypes.c_int),
        ("tiles_a_part", ctypes.c_int), ("k", ctypes.c_int), ("many", ctypes.c_int),
        ("capacity", ctypes.c_int),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """Built once for these sources, into the repository's build folder."""
    files = sorted([*KERNELS.glob("*.h"), *(HERE / "emulated").glob("*")])
    content = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    target = HERE.parents[1] / "build" / f"emulated-{content}.so"
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        for old in target.parent.glob("emulated-*.so"):
            old.unlink()
        partial = target.with_suffix(f".{os.getpid()}")
        command = [
            "g++",
            "-std=c++20",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
        ]
        command += ["-fPIC", "-shared", f"-I{HERE / 'emulated'}", f"-I{KERNELS}"]
        command += [str(HERE / "emulated" / "kernels.cpp"), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial.rename(target)
    return ctypes.CDLL(str(target))


def flags(*values: bool) -> ctypes.Array:
    return (ctypes.c_bool * len(values))(*values)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def shape_of_tiles(rows: int, cols: int) -> tuple[int, int]:
    return -(-rows // TILE_ROWS), -(-cols // TILE_COLS)


def ranges(values: Tensor | None, block: int) -> Tensor | None:
    """As `block_ranges` of m3bind_kernels gives them."""
    if values is None:
        return None
    found = []
    for part in values.split(block):
        counted = part if part.is_floating_point() else part.where(part >= 0, 2**31 - 1)
        found.append(torch.stack([counted.min(), part.max()]))
    return torch.stack(found).to(values.dtype)


def numbers(rows: Tensor | None, cols: Tensor | None, row_mask, col_mask) -> Numbers:
    given = {"row_class": rows, "col_class": cols, "row_mask": row_mask, "col_mask": col_mask}
    blocks = {"row": TILE_ROWS, "col": TILE_COLS}
    extremes = {f"{n}_ranges": ranges(v, blocks[n[:3]]) for n, v in given.items()}
    return Numbers(**given, **extremes)
