"""Builds m3bind's native extension with CMake and ninja against the torch that is installed.

Environment:
    M3BIND_NATIVE=0               pure-Python package, nothing is compiled
    M3BIND_CUDA=AUTO|ON|OFF       CUDA module `_C_cuda` (AUTO: with an nvcc and a torch with CUDA)
    M3BIND_TORCH_DIR=<folder>     torch's package folder, where it cannot be found otherwise
"""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CUDA_CHOICES = ("AUTO", "ON", "OFF")


def find_torch() -> Path:
    """The folder of the installed torch, without importing it."""
    named = os.environ.get("M3BIND_TORCH_DIR")
    if named:
        if not (Path(named) / "include").is_dir():
            raise SystemExit(f"m3bind: M3BIND_TORCH_DIR={named} has no include folder")
        return Path(named)
    # pip's isolated build hides site-packages from sys.path, but not from sysconfig.
    candidates = [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent)
    for folder in candidates:
        if (folder / "include" / "torch").is_dir():
            return folder
    raise SystemExit(
        f"m3bind: no torch found in {candidates[0].parent}: install torch first and build with "
        "--no-build-isolation, or set M3BIND_TORCH_DIR to torch's folder, or set M3BIND_NATIVE=0 "
        "for the pure-Python package"
    )


def torch_version(folder: Path) -> str:
    match = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return match.group(1) if match else "unknown"


def find_tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"m3bind: {name} not found: pip install {name}")
    return path


def build_native(out: Path) -> None:
    """Runs CMake once; it builds every native module into a folder. Nothing here reads
    pyproject.toml, which old versions of setuptools cannot."""
    import pybind11

    cuda = os.environ.get("M3BIND_CUDA", "AUTO").upper()
    if cuda not in CUDA_CHOICES:
        raise SystemExit(f"m3bind: M3BIND_CUDA={cuda}: choose one of {', '.join(CUDA_CHOICES)}")
    torch = find_torch()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("_C_cuda.*"):  # of a build with CUDA, if this one is without
        old.unlink()
    # One folder a Python version, so that builds for several do not overwrite each other.
    work = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    cmake = find_tool("cmake")
    of_native = runpy.run_path(str(ROOT / "m3bind" / "sources.py"))["of_native"]
    configure = [
        cmake,
        # An isolated build's cmake and ninja vanish with it: never trust the cached paths.
        "--fresh",
        "-G",
        "Ninja",
        "-S",
        str(ROOT),
        "-B",
        str(work),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DM3BIND_TORCH_DIR={torch}",
        f"-DM3BIND_TORCH_VERSION={torch_version(torch)}",
        f"-DM3BIND_CUDA={cuda}",
        f"-DM3BIND_CPP_SOURCES_HASH={of_native(ROOT, 'cpp')}",
        f"-DM3BIND_CUDA_SOURCES_HASH={of_native(ROOT, 'cuda')}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
    ]
    for command in (configure, [cmake, "--build", str(work)]):
        done = subprocess.run(command)
        if done.returncode != 0:
            raise SystemExit(
                f"m3bind: the native build failed (see above); M3BIND_NATIVE=0 installs the "
                f"pure-Python package without it: {' '.join(command[:3])}"
            )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build_native(Path(self.get_ext_fullpath(ext.name)).resolve().parent)

    def copy_extensions_to_source(self) -> None:
        """For `--inplace` and editable installs: _C_cuda too, which is no Extension of its own, as
        CMake decides whether it is built."""
        super().copy_extensions_to_source()
        package = ROOT / "m3bind"
        for old in package.glob("_C_cuda.*"):
            old.unlink()
        for module in (Path(self.build_lib) / "m3bind").glob("_C_cuda.*"):
            shutil.copy2(module, package)


class BuildPy(build_py):
    """Ships the top-level configs/*.yaml as m3bind/configs, for use outside the repository."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # m3bind.resources finds them in the checkout
        target = Path(self.build_lib) / "m3bind" / "configs"
        for source in sorted((ROOT / "configs").glob("*.yaml")):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / source.name)


def packages() -> list[str]:
    """Every folder that holds a module, so that none is left out of the wheel."""
    found = set()
    for top, base in (("m3bind", ROOT), ("m3bind_kernels", ROOT / "kernels")):
        for module in (base / top).rglob("*.py"):
            found.add(".".join(module.parent.relative_to(base).parts))
    return sorted(found)


if __name__ == "__main__":  # not where the native build alone is wanted
    native = os.environ.get("M3BIND_NATIVE", "1") != "0"
    setup(
        packages=packages(),
        ext_modules=[Extension("m3bind._C", [])] if native else [],
        cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
    )
