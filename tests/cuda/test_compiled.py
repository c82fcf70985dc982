"""The kernels of csrc/cuda as the ordinary build compiled them: what the compiler made of them."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from m3bind import sources

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Kernels by the instances that the operators can start.
INSTANCES = {"stats_fwd": 2 * 8 + 2 * 4, "stats_bwd": 8 + 8 + 4, "siglip": 2 * 6 + 4, "topk": 2 * 2}
INSTRUCTIONS = re.compile(r"\b(HGMMA|UTMALDG|UTMASTG|USETMAXREG|HMMA|STL|LDL)")


@pytest.fixture(scope="module")
def module() -> Path:
    found = importlib.util.find_spec("m3bind._C_cuda")
    if found is None or found.origin is None:
        pytest.skip("built without nvcc, or for a torch without CUDA")
    return Path(found.origin)


def tool(name: str, *arguments: str | Path) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def test_nothing_is_spilled_and_everything_is_there(module) -> None:
    usage = tool("cuobjdump", "-res-usage", module)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    kernels = [name for name, *_ in found if "_kernel" in name]
    counts = {kind: sum(f"{kind}_kernel" in name for name in kernels) for kind in INSTANCES}
    assert counts == INSTANCES and len(kernels) == sum(INSTANCES.values())
    for name, registers, stack, local in found:
        assert int(registers) <= 168 and stack == local == "0", name


@pytest.mark.slow  # minutes: it is the whole build, of a copy, since objects that exist stay
def test_ptxas_says_that_nothing_is_spilled(module, tmp_path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("which files to copy, git knows")
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.toml", "*.md", "CMakeLists.txt", "csrc"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    for name in listed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=tmp_path, text=True,
        env=os.environ | {"M3BIND_CUDA": "ON"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    said = re.findall(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) .* loads", done.stdout)
    assert said == [("0", "0", "0")] * sum(INSTANCES.values())


def test_hoppers_instructions_are_used(module, tmp_path) -> None:
    code = tool("cuobjdump", "-sass", module)
    functions = re.split(r"\n\s*Function : ", code)[1:]
    assert len(functions) == sum(INSTANCES.values())
    for function in functions:
        name = function.split("\n", 1)[0]
        counts = Counter(INSTRUCTIONS.findall(function))
        # Four steps of 16 features; two loads, once in a loop.
        assert counts["HGMMA"] == 4 and counts["UTMALDG"] >= 2 and counts["USETMAXREG"] == 2, name
        assert counts["HMMA"] == counts["STL"] == counts["LDL"] == 0, name
        stored = "stats_bwd" in name or re.search(
            r"(siglip_kernelI\S+?Lb.ELb.ELb1E|stats_fwd_kernelI\S+?Lb.ELb.ELb0ELb1E)", name
        )
        assert (counts["UTMASTG"] > 0) == bool(stored), name


def test_it_is_built_of_these_sources(module) -> None:
    from m3bind import backends

    found = backends.native_cuda()
    if isinstance(found, str):
        pytest.skip(found)
    assert found.sources == sources.of_native(ROOT, "cuda"), "csrc/cuda changed: build again"
    assert set(found.operators) == {"similarity_stats", "siglip", "similarity_topk"}
