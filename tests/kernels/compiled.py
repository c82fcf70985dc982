"""Compiles the Triton kernels for a processor that is not there, and tells what became of them."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from m3bind_kernels import merge, stats_bwd, stats_far, stats_fwd, tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What a block may take, in bytes: CUDA C Programming Guide, compute capabilities.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
KERNELS = {
    "stats_fwd": stats_fwd._stats_fwd_kernel,
    "stats_bwd": stats_bwd._stats_bwd_kernel,
    "stats_far": stats_far._stats_far_kernel,
    "merge": merge._merge_kernel,
    "ranges": tiles._ranges_kernel,
}
POINTERS = {
    "factor": "*fp32", "row_parts": "*fp32", "col_parts": "*fp32", "row_vectors": "*fp32",
    "col_vectors": "*fp32", "scale_parts": "*fp32", "row_shift_ranges": "*fp32",
    "col_shift_ranges": "*fp32", "parts": "*fp32", "state": "*fp64", "values": "*i32", "far": "*i32",
}  # fmt: skip
SCALARS = {"margin": "fp32", "row_plane": "i64", "col_plane": "i64", "plane": "i64"}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    registers: int
    stack: int
    shared: int
    code: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}", self.code))


def signature(kernel: Any, dtype: str, out: str, constants: dict[str, Any]) -> dict[str, str]:
    """The types that the launchers' arguments have."""
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in ("x", "y"):
            kinds[name] = f"*{dtype}"
        elif name == "out":
            kinds[name] = f"*{out}"
        elif name in POINTERS:
            kinds[name] = POINTERS[name]
        elif "class" in name or "mask" in name:
            kinds[name] = "*i32"
        else:
            kinds[name] = SCALARS.get(name, "i32")
    return kinds


def compile_kernel(
    name: str, capability: int, folder: Path, *, dtype: str = "fp32", out: str = "fp32",
    num_warps: int = 4, num_stages: int = 3, **constants: Any,
) -> Compiled:  # fmt: skip
    kernel = KERNELS[name]
    kinds = signature(kernel, dtype, out, constants)
    # As the launchers' tensors: whole allocations; and a stride that is a multiple of 16.
    aligned = [
        i for i, (arg, kind) in enumerate(kinds.items())
        if kind.startswith("*") or arg == "out_stride"
    ]  # fmt: skip
    compiled = triton.compile(
        ASTSource(
            fn=kernel, signature=kinds, constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )  # fmt: skip
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
