"""The kernels of siglip and similarity_distill, compiled as in test_triton_compile.py."""

import re
from typing import Any

import pytest
from compiled import KERNELS, SHARED_LIMIT, compile_for, compile_kernel
from triton.backends.compiler import GPUTarget

from m3bind_kernels.configs import _ROCM, Config, candidates, fitting, narrowed
from m3bind_kernels.distill_far import far_config
from m3bind_kernels.distill_sides import MOST_RAGGED_COLUMNS
from m3bind_kernels.merge import BLOCK_ENTRIES, BLOCK_PARTS

CAPABILITIES = (80, 90, 100)
ODD = 123  # features
# name -> kernel, the row of the table of configurations, what the launcher makes constant.
PASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "siglip_loss": ("siglip", "siglip_loss", {"LOSS": True, "GRADIENT": False}),
    "siglip_both": ("siglip", "siglip", {"LOSS": True, "GRADIENT": True}),
    "siglip_gradient": ("siglip", "siglip", {"LOSS": False, "GRADIENT": True}),
    "distill_kl": ("distill_fwd", "distill_fwd", {"KL": True}),
    "distill_ce": ("distill_fwd", "distill_fwd", {"KL": False}),
    "distill_far": ("distill_far", "distill_fwd", {"KL": True}),
    "distill_gradient": ("distill_bwd", "distill_bwd", {}),
}
# What the default asks for, and everything at once.
USUAL, EVERYTHING = {"classes": True, "masks": False}, {"classes": True, "masks": True}


def constants_of(
    name: str, capability: int, config: Config, dtype: str, out: str | None, *, classes: bool,
    masks: bool, even: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The constants of the launchers, as `stats_constants` gives them for similarity_stats."""
    kernel, _, fixed = PASSES[name]
    arguments = KERNELS[kernel].arg_names
    described = dtype != "fp32" and even and capability >= 90 and name != "distill_far"
    gradient = fixed.get("GRADIENT", kernel == "distill_bwd")
    apart = gradient and classes and dtype == out == "fp16"
    known = fixed | {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "PIECE": config.piece, "EVEN_K": even, "HAS_CLASSES": classes, "HAS_MASKS": masks,
        "APART": apart, "INTERPRETED": False, "DESCRIPTORS": described,
        "STORE_BY_DESCRIPTOR": described and gradient and out != "fp32",
    }  # fmt: skip
    missing = [
        n for n in arguments if ("class" in n and not classes) or ("mask" in n and not masks)
    ]
    if not apart:
        missing.append("lone")
    if not fixed.get("LOSS", True):
        missing.append("losses")
    if not gradient:
        missing += ["weights", "boost", "wanted", "sums"]
    return {n: v for n, v in (known | dict.fromkeys(missing)).items() if n in arguments}


def check(name, capability, config, given, dtype, out, tmp_path, *, even=True, **fixed):
    constants = constants_of(name, capability, config, dtype, out, **given, even=even)
    result = compile_kernel(
        PASSES[name][0], capability, tmp_path, dtype=dtype, out=out, num_warps=config.num_warps,
        num_stages=config.num_stages, **constants, **fixed,
    )  # fmt: skip
    result.check(capability, dtype != "fp32")
    return result


def configurations(name: str, dtype: str, capability: int) -> list[Config]:
    found = candidates(PASSES[name][1], dtype != "fp32", capability, SHARED_LIMIT[capability])
    return [far_config(config) for config in found] if name == "distill_far" else found


def outs(name: str, dtype: str) -> tuple[str | None, ...]:
    """The types of derivatives that a pass may store."""
    if PASSES[name][0] not in ("siglip", "distill_bwd") or name == "siglip_loss":
        return (None,)
    return ("fp32",) if dtype == "fp32" else ("fp16", "fp32")


def every_case():
    for name in PASSES:
        for dtype in ("bf16", "fp16", "fp32"):
            # No instruction of later processors is in the kernels of float32.
            for capability in CAPABILITIES if dtype != "fp32" else (80,):
                configs = configurations(name, dtype, capability)
                if dtype == "fp16":
                    configs = configs[:1]  # the same code as bf16 but for one letter
                for config in configs:
                    for out in outs(name, dtype):
                        for given in (USUAL, EVERYTHING):
                            yield name, capability, config, given, dtype, out


def describe(case):
    name, capability, c, given, dtype, out = case
    tile = f"{c.block_m}x{c.block_n}x{c.block_k}-{c.num_warps}-{c.num_stages}"
    which = "usual" if given == USUAL else "everything"
    return f"{name}-sm{capability}-{tile}-{dtype}-{out}-{which}"


FAST = (
    ("siglip_loss", 80, EVERYTHING, "bf16", None),
    ("siglip_both", 90, USUAL, "bf16", "fp16"),
    ("siglip_gradient", 80, USUAL, "fp32", "fp32"),
    ("distill_kl", 90, USUAL, "bf16", None),
    ("distill_far", 80, EVERYTHING, "fp32", None),
    ("distill_gradient", 90, EVERYTHING, "bf16", "fp16"),
)


@pytest.mark.parametrize(("name", "capability", "given", "dtype", "out"), FAST)
def test_first_configuration(name, capability, given, dtype, out, tmp_path):
    config = configurations(name, dtype, capability)[0]
    result = check(name, capability, config, given, dtype, out, tmp_path)
    if capability == 90 and dtype != "fp32":
        assert result.count("UTMALDG") > 0  # features come by the tensor memory accelerator
        assert out != "fp16" or result.count("UTMASTG") > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", list(every_case()), ids=describe)
def test_every_configuration(case, tmp_path):
    check(*case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
def test_odd_number_of_features(name, dtype, tmp_path):
    capability = 90 if dtype == "bf16" else 80
    listed = fitting(configurations(name, dtype, capability), ODD)
    if name.startswith("distill"):
        listed = [narrowed(config, MOST_RAGGED_COLUMNS) for config in listed]
    out = outs(name, dtype)[-1]
    for config in dict.fromkeys(listed):
        check(name, capability, config, EVERYTHING, dtype, out, tmp_path, even=False)


@pytest.mark.parametrize("name", PASSES)
def test_sizes_of_one_are_constants(name, tmp_path):
    """Triton makes a constant of every integer argument that is 1."""
    sizes = ("num_rows", "num_cols", "num_features", "teacher_features", "plane")
    ones = {n: 1 for n in sizes if n in KERNELS[PASSES[name][0]].arg_names}
    config = configurations(name, "fp32", 80)[0]
    out = outs(name, "fp32")[0]
    check(name, 80, config, EVERYTHING, "fp32", out, tmp_path, even=False, **ones)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_merge_and_rescale(capability, tmp_path):
    merged = compile_kernel(
        "distill_merge", capability, tmp_path, KL=True, BLOCK_PARTS=BLOCK_PARTS,
        BLOCK_ENTRIES=BLOCK_ENTRIES,
    )  # fmt: skip
    rescaled = compile_kernel("rescale", capability, tmp_path, BLOCK=4096)
    for result in (merged, rescaled):
        assert result.stack == result.count("STL") == result.count("LDL") == 0


@pytest.mark.parametrize("name", PASSES)
def test_rocm(name):
    out = outs(name, "bf16")[0]
    compiled = compile_for(
        GPUTarget("hip", "gfx942", 64), PASSES[name][0], dtype="bf16", out=out,
        num_warps=_ROCM.num_warps, num_stages=_ROCM.num_stages,
        **constants_of(name, 80, _ROCM, "bf16", out, **EVERYTHING),
    )  # fmt: skip
    code = compiled.asm["amdgcn"]
    assert compiled.metadata.shared <= 64 << 10
    assert "v_mfma" in code
    assert re.findall(r"vgpr_spill_count: *(\d+)", code) == ["0"]
