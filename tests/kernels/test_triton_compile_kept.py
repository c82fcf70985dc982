"""The kernels that keep powers, and those that take them, compiled as in test_triton_compile.py."""

import re

import pytest
from compiled import compile_for, compile_kernel, stats_constants
from test_triton_compile import CAPABILITIES, DIAGONAL, ODD, check, configurations
from triton.backends.compiler import GPUTarget

from m3bind_kernels import hopper, kept
from m3bind_kernels.configs import _ROCM, fitting

MASKED = (True, True, False)  # where totals are wanted nothing is kept
TILES = ((64, 64), (64, 256), (128, 128), (128, 256))


def every_case():
    for capability in CAPABILITIES:
        for dtype in ("bf16", "fp16", "fp32"):
            if dtype == "fp32" and capability != 80:
                continue
            out = "fp32" if dtype == "fp32" else "fp16"
            for kernel in ("stats_fwd", "stats_bwd"):
                configs = configurations(kernel, dtype != "fp32", capability)
                if kernel == "stats_bwd" and capability == 90:
                    configs = [*configs, hopper.TILE]  # beside the forward pass of CUDA C++
                for config in configs[:1] if dtype == "fp16" else configs:
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
    config = hopper.TILE if kernel == "stats_bwd" else configurations(kernel, True, 90)[0]
    result = check(kernel, 90, config, DIAGONAL, "bf16", "fp16", tmp_path, kept=True)
    # Powers leave in pieces of 16 bytes.
    assert kernel == "stats_bwd" or result.count(r"STG\.E\.EF\.128") > 0


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ("stats_fwd", "stats_bwd"))
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_odd_number_of_features(kernel, dtype, tmp_path):
    capability, out = (90, "fp16") if dtype == "bf16" else (80, "fp32")
    for config in fitting(configurations(kernel, dtype != "fp32", capability), ODD):
        check(kernel, capability, config, MASKED, dtype, out, tmp_path, even=False, kept=True)


def constants_of(tile, lost: bool) -> dict:
    found = {"BLOCK_M": tile[0], "BLOCK_N": tile[1], "PIECE": kept.PIECE}
    return found if lost else found | {"row_lost": None, "col_lost": None}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("tile", "dtype"), [(TILES[0], "fp32"), *((t, "fp16") for t in TILES[1:])])
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
        constants = constants_of((_ROCM.block_m, _ROCM.block_n), lost=True)
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
