"""The kernels of the searches in every configuration, as test_triton_compile.py does the others."""

import pytest
from compiled import KERNELS, SHARED_LIMIT, TENSOR_CORE, compile_kernel
from test_triton_compile import CAPABILITIES

from m3bind_kernels import topk
from m3bind_kernels.configs import Config, candidates

# (kernel, are pairs masked, what is constant): Triton makes constants of integers that are 1.
VARIANTS = (
    ("rank_own", False, {}),
    ("rank_own", False, {"num_slots": 1}),
    ("rank", False, {"num_slots": 1}),
    ("rank", True, {"num_slots": 1}),
    ("rank", True, {}),
    ("topk", True, {"CAPACITY": 256}),
    ("topk", False, {"CAPACITY": 256, "k": 1, "num_parts": 1}),
    ("topk", True, {"CAPACITY": 128}),  # small k, where tiles have 64 columns
    ("topk", True, {"CAPACITY": 512}),
    ("topk", True, {"CAPACITY": 1024}),
    ("topk", True, {"CAPACITY": 2048}),  # k = 1024
)


def constants(kernel: str, capability: int, config: Config, dtype: str, masks: bool, even: bool):
    """The constants of the launchers."""
    describe = dtype != "fp32" and even and capability >= 90 and kernel != "rank_own"
    found = {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "PIECE": config.piece, "EVEN_K": even, "INTERPRETED": False, "DESCRIPTORS": describe,
    }  # fmt: skip
    if kernel != "rank_own":
        found["HAS_MASKS"] = masks
        if not masks:
            found |= dict.fromkeys(name for name in KERNELS[kernel].arg_names if "mask" in name)
    return found


def check(kernel, capability, config, dtype, masks, fixed, tmp_path, *, even=True):
    given = constants(kernel, capability, config, dtype, masks, even)
    if kernel == "rank":
        given["FLATTEN"] = fixed.get("num_slots") == 1
    result = compile_kernel(
        kernel, capability, tmp_path, dtype=dtype, num_warps=config.num_warps,
        num_stages=config.num_stages, **given, **fixed,
    )  # fmt: skip
    assert result.stack == 0
    assert result.count("STL") == result.count("LDL") == 0
    assert result.shared <= SHARED_LIMIT[capability]
    assert (result.count(TENSOR_CORE[capability]) > 0) == (dtype != "fp32")
    # Features come by the tensor memory accelerator.
    assert (result.count("UTMALDG") > 0) == given["DESCRIPTORS"]


def configurations(capability: int, dtype: str, *, ragged: bool = False) -> list[Config]:
    kernel = "search_ragged" if ragged else "search"
    return candidates(kernel, dtype != "fp32", capability, SHARED_LIMIT[capability])


def every_case():
    for capability in CAPABILITIES:
        for dtype in ("bf16", "fp16", "fp32"):
            configs = configurations(capability, dtype)
            if dtype == "fp32" and capability != 80:
                configs = []  # no instruction of later processors in it
            if dtype == "bf16" and capability >= 90:  # by descriptors: ragged, but whole 16 bytes
                configs = configs + configurations(capability, dtype, ragged=True)
            if dtype == "fp16":
                configs = configs[:1]  # the same code as bf16 but for one letter
            for config in configs:
                for variant in VARIANTS:
                    yield capability, config, dtype, variant


def describe(case):
    capability, c, dtype, (kernel, masks, fixed) = case
    tile = f"{c.block_m}x{c.block_n}x{c.block_k}-{c.num_warps}-{c.num_stages}"
    which = "-".join(f"{name}={value}" for name, value in fixed.items())
    return f"{kernel}-sm{capability}-{tile}-{dtype}-{'masks' if masks else 'plain'}-{which}"


@pytest.mark.parametrize("variant", (VARIANTS[0], VARIANTS[3], VARIANTS[5]), ids=lambda v: v[0])
@pytest.mark.parametrize(("capability", "dtype"), ((80, "fp32"), (80, "bf16"), (90, "bf16")))
def test_first_configuration(capability, dtype, variant, tmp_path):
    kernel, masks, fixed = variant
    config = configurations(capability, dtype)[0]
    check(kernel, capability, config, dtype, masks, fixed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(every_case()), ids=describe)
def test_every_configuration(case, tmp_path):
    capability, config, dtype, (kernel, masks, fixed) = case
    check(kernel, capability, config, dtype, masks, fixed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v[0]}-{v[1]}-{v[2]}")
@pytest.mark.parametrize(("capability", "dtype"), ((80, "fp32"), (80, "bf16"), (90, "bf16")))
def test_odd_number_of_features(capability, dtype, variant, tmp_path):
    kernel, masks, fixed = variant
    (config,) = configurations(capability, dtype, ragged=True)
    check(kernel, capability, config, dtype, masks, fixed, tmp_path, even=False)


@pytest.mark.parametrize(
    ("kernel", "more"), (("rank_own", {}), ("rank", {}), ("topk", {"CAPACITY": 128}))
)
def test_sizes_of_one_are_constants(kernel, more, tmp_path):
    """Triton makes a constant of every integer argument that is 1."""
    names = (
        "num_rows", "num_cols", "num_pairs", "num_features", "num_slots", "num_parts",
        "tiles_a_part", "k",
    )  # fmt: skip
    ones = {name: 1 for name in names if name in KERNELS[kernel].arg_names}
    (config,) = configurations(80, "fp32")
    check(kernel, 80, config, "fp32", True, ones | more, tmp_path, even=False)


def test_every_capacity_is_compiled():
    compiled = {fixed["CAPACITY"] for kernel, _, fixed in VARIANTS if kernel == "topk"}
    for capability in CAPABILITIES:
        for dtype in ("bf16", "fp32"):
            ragged = configurations(capability, dtype, ragged=True)
            for config in configurations(capability, dtype) + ragged:
                used = {topk.capacity(k, config) for k in range(1, 1025)}
                assert used <= compiled, used
