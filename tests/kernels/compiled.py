"""Compiles the Triton kernels for a processor that is not there, and tells what became of them."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from m3bind_kernels import (
    distill_bwd,
    distill_far,
    distill_fwd,
    distill_merge,
    kept,
    merge,
    rank,
    siglip,
    stats_bwd,
    stats_far,
    stats_fwd,
    stats_side,
    tiles,
    topk,
    waves,
)
from m3bind_kernels.configs import Config

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What a block may take, in bytes: CUDA C++ Programming Guide, table of compute capabilities.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
KERNELS = {
    "stats_fwd": stats_fwd._stats_fwd_kernel,
    "stats_far": stats_far._stats_far_kernel,
    "stats_bwd": stats_bwd._stats_bwd_kernel,
    "stats_side": stats_side._stats_side_kernel,
    "kept_bwd": kept._kept_bwd_kernel,
    "merge": merge._merge_kernel,
    "rank_own": rank._rank_own_kernel,
    "rank": rank._rank_kernel,
    "topk": topk._topk_kernel,
    "ranges": tiles._ranges_kernel,
    "siglip": siglip._siglip_kernel,
    "distill_fwd": distill_fwd._distill_fwd_kernel,
    "distill_far": distill_far._distill_far_kernel,
    "distill_bwd": distill_bwd._distill_bwd_kernel,
    "distill_merge": distill_merge._distill_merge_kernel,
    "rescale": waves._rescale_kernel,
}
POINTERS = dict.fromkeys(
    ("factor", "row_parts", "col_parts", "row_vectors", "col_vectors", "scale_parts", "parts",
     "row_shift_ranges", "col_shift_ranges", "row_lost", "col_lost", "lost", "logits", "losses",
     "weights", "boost", "lone", "sums", "ratio", "factors", "total", "limits", "gradient",
     "shifts", "row_sums", "col_sums", "kept_row_sums", "kept_col_sums"),
    "*fp32",
) | dict.fromkeys(
    ("values", "far", "wanted", "labels", "own", "better", "counts", "listed", "num_listed", "left",
     "left_count"), "*i32",
) | {"state": "*fp64", "keys": "*i64"}  # fmt: skip
SCALARS = {
    "margin": "fp32",
    "reach": "fp32",
    "row_plane": "i64",
    "col_plane": "i64",
    "plane": "i64",
}

# What a forward pass that keeps nothing is not given.
KEEPING = ("powers", "shifts", "kept_row_sums", "kept_col_sums")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    registers: int
    stack: int
    shared: int
    code: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}", self.code))

    def check(self, capability: int, half: bool) -> None:
        """No spills, shared memory that there is, and tensor cores for 16-bit features."""
        assert self.stack == 0
        assert self.count("STL") == self.count("LDL") == 0
        assert self.shared <= SHARED_LIMIT[capability]
        assert (self.count(TENSOR_CORE[capability]) > 0) == half


def stats_constants(
    name: str, capability: int, config: Config, *, dtype: str, out: str, classes: bool,
    masks: bool, totals: bool, even: bool = True, kept: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The constants of the launchers, for features of a multiple of block_k (or an odd number)."""
    describe = dtype != "fp32" and even and capability >= 90
    constants: dict[str, Any] = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "PIECE": config.piece, "EVEN_K": even, "HAS_CLASSES": classes, "HAS_MASKS": masks,
        "INTERPRETED": False, "DESCRIPTORS": describe and name != "stats_far",
    }  # fmt: skip
    if name != "stats_far":
        constants["TOTALS"] = totals
    if not kept:
        absent = {"stats_fwd": KEEPING, "stats_bwd": ("listed", "num_listed")}
        constants |= dict.fromkeys(absent.get(name, ()))
    if name == "stats_bwd":
        constants["STORE_BY_DESCRIPTOR"] = describe and out != "fp32"
        constants["APART"] = classes and dtype == out == "fp16"
        if out == "fp32":
            constants |= {"row_lost": None, "col_lost": None}
    for kind, given in (("class", classes), ("mask", masks)):
        if not given:
            names = [n for n in KERNELS[name].arg_names if kind in n]
            constants |= dict.fromkeys(names)
    return constants


def signature(
    kernel: Any, dtype: str, out: str | None, constants: dict[str, Any]
) -> dict[str, str]:
    """The types that the launchers' arguments have."""
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in ("x", "y", "teacher_x", "teacher_y"):
            kinds[name] = f"*{dtype}"
        elif name == "powers":
            kinds[name] = "*fp32" if dtype == "fp32" else "*fp16"
        elif name in ("out", "other"):
            kinds[name] = f"*{out}"
        elif "class" in name or "mask" in name:
            kinds[name] = "*i32"
        else:
            kinds[name] = (POINTERS | SCALARS).get(name, "i32")
    return kinds


def compile_for(
    target: GPUTarget, name: str, *, dtype: str = "fp32", out: str | None = "fp32",
    num_warps: int = 4, num_stages: int = 3, **constants: Any,
) -> Any:  # fmt: skip
    kernel = KERNELS[name]
    if out is None and "out" in kernel.arg_names:
        constants["out"] = None
    kinds = signature(kernel, dtype, out, constants)
    # Whole allocations, a padded stride, and as many features as models have: Triton is told that
    # these are multiples of 16.
    multiples = ["out_stride", "powers_stride"]
    if constants.get("EVEN_K"):
        multiples += ["num_features", "teacher_features"]
    aligned = [
        i for i, (arg, kind) in enumerate(kinds.items()) if kind.startswith("*") or arg in multiples
    ]
    return triton.compile(
        ASTSource(
            fn=kernel, signature=kinds, constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=target,
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True},
    )  # fmt: skip


def compile_kernel(name: str, capability: int, folder: Path, **options: Any) -> Compiled:
    if triton.__version__.startswith("3.6") and capability != 90:
        pytest.skip(
            "the compiler of Triton 3.6 stops at some kernels for sm_100, and spills on sm_80"
        )
    compiled = compile_for(GPUTarget("cuda", capability, 32), name, **options)
    binary = folder / f"{name}.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = _tool("cuobjdump", "-res-usage", binary)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Compiled(
        registers=int(found[1]), stack=int(found[2]), shared=compiled.metadata.shared,
        code=_tool("nvdisasm", "-c", binary),
    )  # fmt: skip


def _tool(name: str, *arguments: str | Path) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
