"""The kernels that keep powers, and those that take them, compiled as in test_triton_compile.py."""

import re

import pytest
from compiled import compile_for, compile_kernel, stats_constants
from test_triton_compile import CAPABILITIES, DIAGONAL, ODD, check, configurations
from triton.backends.compiler import GPUTarget

from m3bind_kernels import hopper, kept
from m3bind_kernels.configs import _ROCM, Config, fitting
from m3bind_kernels.stats_far import far_config

MASKED = (True, True, False)  # where totals are wanted nothing is kept


def configs_of(kernel: str, half: bool, capability: int) -> list[Config]:
    """Both passes go over one and the same tile; that of CUDA C++ has its own forward pass."""
    found = configurations("stats_fwd", half, capability)[:1]
    if kernel == "stats_fwd":
        return found
    return [far_config(c) for c in (*found, *([hopper.TILE] if half and capability == 90 else ()))]


def every_case():
    for capability in CAPABILITIES:
        for dtype in ("bf16", "fp16", "fp32"):
            if dtype == "fp32" and capability != 80:
                continue
            out = "fp32" if dtype == "fp32" else "fp16"
            for kernel in ("stats_fwd", "stats_bwd"):
                for config in configs_of(kernel, dtype != "fp32", capability):
                    for given in (DIAGONAL, MASKED):
                        yield kernel, capability, config, given, dtype, out


def describe(case):
    kernel, capability, c, given, dtype, _ = case
    tile = f"{c.block_m}x{c.block_n}x{c.block_k}-{c.num_stages}"
    return f"{kernel}-sm{capability}-{tile}-{dtype}-{'diagonal' if given == DIAGONAL else 'masks'}"


@pytest.mark.slow
@pytest.mark.parametrize("case", list(every_case()), ids=describe)
def test_every_configuration(case, tmp_path):
    check(*case, tmp_path, kept=True)


@pytest.mark.parametrize("kernel", ("stats_fwd", "stats_bwd"))
def test_first_configuration(kernel, tmp_path):
    config = configs_of(kernel, True, 90)[-1]
    result = check(kernel, 90, config, DIAGONAL, "bf16", "fp16", tmp_path, kept=True)
    # Powers leave in pieces of 16 bytes.
    assert kernel == "stats_bwd" or result.count(r"STG\.E\.EF\.128") > 0


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ("stats_fwd", "stats_bwd"))
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_odd_number_of_features(kernel, dtype, tmp_path):
    capability, out = (90, "fp16") if dtype == "bf16" else (80, "fp32")
    for config in fitting(configs_of(kernel, dtype != "fp32", capability)[:1], ODD):
        check(kernel, capability, config, MASKED, dtype, out, tmp_path, even=False, kept=True)


def constants_of(tile: tuple[int, int], *, lost: bool = True) -> dict:
    found = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "ROWS": kept.PAIRS // tile[1]}
    return found if lost else found | {"row_lost": None, "col_lost": None}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("tile", "dtype"),
    [((64, 64), "fp32"), ((64, 256), "fp16"), ((128, 128), "fp16"), ((128, 256), "fp16")],
)
def test_taking_them(capability, tile, dtype, tmp_path):
    result = compile_kernel(
        "kept_bwd", capability, tmp_path, dtype=dtype, out=dtype, num_warps=8,
        **constants_of(tile, lost=dtype != "fp32"),
    )  # fmt: skip
    assert result.stack == result.count("STL") == result.count("LDL") == 0
    assert result.registers <= 128  # two programs on a multiprocessor
    assert result.count(r"LDG\.E\.\S*128") > 0 and result.count(r"STG\.E\.128") > 0


@pytest.mark.parametrize("kernel", ("stats_fwd", "stats_bwd", "kept_bwd"))
def test_rocm(kernel):
    if kernel == "kept_bwd":
        constants = constants_of((_ROCM.block_m, _ROCM.block_n))
    else:
        constants = stats_constants(
            kernel, 80, _ROCM, dtype="bf16", out="fp16", classes=True, masks=True, totals=False,
            kept=True,
        )  # fmt: skip
    warps = 8 if kernel == "kept_bwd" else _ROCM.num_warps
    compiled = compile_for(
        GPUTarget("hip", "gfx942", 64), kernel, dtype="bf16", out="fp16", num_warps=warps,
        num_stages=_ROCM.num_stages, **constants,
    )  # fmt: skip
    code = compiled.asm["amdgcn"]
    assert compiled.metadata.shared <= 64 << 10
    assert re.findall(r"vgpr_spill_count: *(\d+)", code) == ["0"]
