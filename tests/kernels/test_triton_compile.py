"""Every Triton kernel in every configuration, compiled for processors that are not there.

No register is spilled, the shared memory fits the device, and the products of 16-bit features run
on its tensor cores. The number of features is no constant of the kernels: one compilation stands
for 256, 512, 768 and 1024, which differ in nothing that Triton looks at.
"""

import re

import pytest
import torch
from compiled import (
    KERNELS,
    SHARED_LIMIT,
    TENSOR_CORE,
    compile_for,
    compile_kernel,
    stats_constants,
)
from triton.backends.compiler import GPUTarget

from m3bind_kernels import hopper
from m3bind_kernels.configs import _ROCM, Config, candidates, fitting, side_config
from m3bind_kernels.stats_far import far_config

CAPABILITIES = (80, 90, 100)
ODD = 123  # features
# (classes, masks, totals): the default, and everything at once.
DIAGONAL, EVERYTHING = (True, False, False), (True, True, True)


def configurations(kernel: str, half: bool, capability: int) -> list[Config]:
    # stats_far runs with the configuration of the forward pass.
    listed = "stats_bwd" if kernel == "stats_bwd" else "stats_fwd"
    found = candidates(listed, half, capability, SHARED_LIMIT[capability])
    return [far_config(config) for config in found] if kernel == "stats_far" else found


def check(
    kernel, capability, config, given, dtype, out, tmp_path, *, even=True, kept=False, **fixed
):
    classes, masks, totals = given
    half = dtype != "fp32"
    result = compile_kernel(
        kernel, capability, tmp_path, dtype=dtype, out=out, num_warps=config.num_warps,
        num_stages=config.num_stages,
        **stats_constants(
            kernel, capability, config, dtype=dtype, out=out, classes=classes, masks=masks,
            totals=totals, even=even, kept=kept,
        ), **fixed,
    )  # fmt: skip
    result.check(capability, half)
    return result


def every_case():
    for capability in CAPABILITIES:
        for kernel in ("stats_fwd", "stats_far", "stats_bwd"):
            for dtype in ("bf16", "fp16", "fp32"):
                configs = configurations(kernel, dtype != "fp32", capability)
                if dtype == "fp32" and capability != 80:
                    configs = []  # no instruction of later processors in it
                if dtype == "fp16":
                    configs = configs[:1]  # the same code as bf16 but for one letter
                outs = ("fp16", "fp32") if kernel == "stats_bwd" and dtype != "fp32" else ("fp32",)
                for config in configs:
                    for out in outs:
                        for given in (DIAGONAL, EVERYTHING):
                            yield kernel, capability, config, given, dtype, out


def describe(case):
    kernel, capability, c, given, dtype, out = case
    tile = f"{c.block_m}x{c.block_n}x{c.block_k}-{c.num_warps}-{c.num_stages}"
    which = "diagonal" if given == DIAGONAL else "everything"
    return f"{kernel}-sm{capability}-{tile}-{dtype}-{out}-{which}"


CASES = list(every_case())
FAST = (
    ("stats_fwd", 80, DIAGONAL, "bf16", "fp32"),
    ("stats_fwd", 90, DIAGONAL, "bf16", "fp32"),
    ("stats_bwd", 90, DIAGONAL, "bf16", "fp16"),
    ("stats_far", 100, EVERYTHING, "bf16", "fp32"),
    ("stats_bwd", 80, DIAGONAL, "fp32", "fp32"),
)


@pytest.mark.parametrize(("kernel", "capability", "given", "dtype", "out"), FAST)
def test_first_configuration(kernel, capability, given, dtype, out, tmp_path):
    config = configurations(kernel, dtype != "fp32", capability)[0]
    result = check(kernel, capability, config, given, dtype, out, tmp_path)
    if capability == 90 and kernel != "stats_far":
        assert result.count("UTMALDG") > 0  # features come by the tensor memory accelerator
        assert kernel != "stats_bwd" or result.count("UTMASTG") > 0


@pytest.mark.parametrize("given", (DIAGONAL, EVERYTHING), ids=("diagonal", "everything"))
def test_what_goes_over_the_tiles_of_cuda(given, tmp_path):
    check("stats_far", 90, far_config(hopper.TILE), given, "bf16", "fp32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_every_configuration(case, tmp_path):
    check(*case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ("stats_fwd", "stats_far", "stats_bwd"))
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_odd_number_of_features(kernel, dtype, tmp_path):
    capability = 90 if dtype == "bf16" else 80
    listed = configurations(kernel, dtype != "fp32", capability)
    outs = ("fp32", "fp16") if kernel == "stats_bwd" and dtype != "fp32" else ("fp32",)
    for config in fitting(listed, ODD):
        for out in outs:
            check(kernel, capability, config, EVERYTHING, dtype, out, tmp_path, even=False)


@pytest.mark.parametrize("kernel", ("stats_fwd", "stats_far", "stats_bwd"))
def test_sizes_of_one_are_constants(kernel, tmp_path):
    """Triton makes a constant of every integer argument that is 1."""
    ones = dict.fromkeys(("num_rows", "num_cols", "num_features"), 1)
    strides = ("row_stride", "col_stride") if kernel == "stats_bwd" else ("row_plane", "col_plane")
    config = Config(64, 64, 32, 4, 3)
    given = (True, True, kernel != "stats_far")
    check(
        kernel, 80, config, given, "fp32", "fp32", tmp_path, even=False,
        **ones, **dict.fromkeys(strides, 1),
    )  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("sums", (0, 2))
def test_merge_and_ranges(capability, sums, tmp_path):
    merged = compile_kernel(
        "merge", capability, tmp_path, SUMS=sums, BLOCK_PARTS=16, BLOCK_ENTRIES=64
    )
    ranges = compile_kernel(
        "ranges", capability, tmp_path, SKIP_NEGATIVE=True, BLOCK=128, out="i32"
    )
    for result in (merged, ranges):
        assert result.stack == result.count("STL") == result.count("LDL") == 0


def check_side(capability, features, given, dtype, other, tmp_path):
    classes, masks, totals = given
    config = side_config(torch.float32 if other == "fp32" else torch.float16, features)
    constants = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "BLOCK_D": config.block_d, "EVEN_K": features % config.block_k == 0,
        "EVEN_D": features == config.block_d, "HAS_CLASSES": classes,
        "HAS_MASKS": masks, "TOTALS": totals, "GRADIENT": True, "INTERPRETED": False,
        "APART": classes and dtype == other == "fp16",
    }  # fmt: skip
    arguments = KERNELS["stats_side"].arg_names
    absent = ("class" if not classes else "-", "mask" if not masks else "-")
    constants |= dict.fromkeys(n for n in arguments if any(kind in n for kind in absent))
    if other == "fp32":
        constants["lost"] = None
    result = compile_kernel(
        "stats_side", capability, tmp_path, dtype=dtype, out=other,
        num_warps=config.num_warps, num_stages=config.num_stages, **constants,
    )  # fmt: skip
    assert result.stack == result.count("STL") == result.count("LDL") == 0
    assert result.shared <= SHARED_LIMIT[capability]
    if other != "fp32":
        assert result.count(TENSOR_CORE[capability]) > 0


def test_side(tmp_path):
    check_side(90, 128, DIAGONAL, "bf16", "fp16", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("given", (DIAGONAL, EVERYTHING), ids=("diagonal", "everything"))
@pytest.mark.parametrize("features", (13, 16, 24, 32, 61, 64, 96, 123, 128, 251, 256))
@pytest.mark.parametrize(
    ("capability", "dtype", "other"),
    [(c, d, "fp16") for c in CAPABILITIES for d in ("bf16", "fp16")]
    + [(80, d, "fp32") for d in ("bf16", "fp16", "fp32")],
)
def test_every_side(capability, dtype, other, features, given, tmp_path):
    check_side(capability, features, given, dtype, other, tmp_path)


@pytest.mark.parametrize("kernel", ("stats_fwd", "stats_far", "stats_bwd"))
def test_rocm(kernel):
    constants = stats_constants(
        kernel, 80, _ROCM, dtype="bf16", out="fp16", classes=True, masks=True, totals=True
    )
    compiled = compile_for(
        GPUTarget("hip", "gfx942", 64), kernel, dtype="bf16", out="fp16",
        num_warps=_ROCM.num_warps, num_stages=_ROCM.num_stages, **constants,
    )  # fmt: skip
    code = compiled.asm["amdgcn"]
    assert compiled.metadata.shared <= 64 << 10
    assert "v_mfma" in code
    assert re.findall(r"vgpr_spill_count: *(\d+)", code) == ["0"]
