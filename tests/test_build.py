"""What a wheel ships, and what the build says when it cannot go on."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE")
FOLDERS = ("csrc", "kernels", "m3bind", "configs")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a build reads, so that a build here leaves the repository alone."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        if (ROOT / name).exists():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


def build(checkout: Path, out: Path, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    return subprocess.run(
        [*command, "--no-index", "-w", str(out)],
        cwd=checkout,
        env={**os.environ, "M3BIND_CUDA": "OFF", **env},  # whose kernels take a minute
        capture_output=True,
        text=True,
    )


def wheel_in(out: Path, done: subprocess.CompletedProcess) -> Path:
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def other_environment(folder: Path) -> Path:
    """A new environment that sees this one's torch, but not this one's m3bind."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # A .pth line that names a folder is not searched for further .pth files, so the editable
    # install of m3bind in the first environment stays out of sight.
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install_and_use(wheel: Path, tmp_path: Path) -> str:
    python = other_environment(tmp_path / "other")
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*install, "--target", target, str(wheel)], check=True, capture_output=True)
    code = (
        "import runpy, sys, torch, m3bind, m3bind_kernels; from m3bind import resources;"
        "x = torch.randn(8, 4); print(m3bind.__file__, float(m3bind.clip_loss(x, x, 2.0)));"
        "assert list(resources.configs_dir().glob('*.yaml'));"
        "from m3bind import backends, verified; verified.table();"
        "assert backends.installed_sources('siglip', 'triton');"
        "sys.argv = ['m3bind', 'info']; runpy.run_module('m3bind', run_name='__main__')"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert target in done.stdout
    return done.stdout


def test_pure_wheel_holds_every_module_and_works_elsewhere(checkout, tmp_path):
    wheel = wheel_in(tmp_path, build(checkout, tmp_path, M3BIND_NATIVE="0"))
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for base, top in ((ROOT, "m3bind"), (ROOT / "kernels", "m3bind_kernels")):
        for module in (base / top).rglob("*.py"):
            assert str(module.relative_to(base)) in names
    for config in (ROOT / "configs").glob("*.yaml"):
        assert f"m3bind/configs/{config.name}" in names
    assert {"m3bind/py.typed", "m3bind/_verified.json"} <= names
    assert not any(n.startswith(("tests/", "benchmarks/", "csrc/")) for n in names)
    text = install_and_use(wheel, tmp_path)
    assert "default chunked" in text
    assert "installed without its native extension (M3BIND_NATIVE=0)" in text


@pytest.mark.slow  # fast sibling: test_pure_wheel_holds_every_module_and_works_elsewhere
def test_native_wheel_works_elsewhere(checkout, tmp_path):
    wheel = wheel_in(tmp_path, build(checkout, tmp_path))
    assert "linux" in wheel.name
    assert any(n.startswith("m3bind/_C.") for n in zipfile.ZipFile(wheel).namelist())
    assert "default cpp" in install_and_use(wheel, tmp_path)


def test_the_source_distribution_holds_what_a_build_needs(checkout, tmp_path):
    code = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.strip().splitlines()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "kernels", "configs", "m3bind", "CMakeLists.txt", "setup.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not set(tracked.stdout.split()) - held


def setup(checkout: Path, *arguments: str, **env: str) -> str:
    """Runs setup.py without site-packages' torch in sight; the build must fail."""
    code = (
        "import sys, sysconfig, importlib.util, runpy\n"
        "sysconfig.get_path = lambda *a, **k: '/nonexistent'\n"
        "importlib.util.find_spec = lambda *a, **k: None\n"
        f"sys.argv = ['setup.py', *{list(arguments)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_without_torch_one_line_tells_what_to_do(checkout):
    last = setup(checkout, "build_ext")
    assert last.startswith("m3bind: no torch found in")
    assert "install torch first" in last and "M3BIND_NATIVE=0" in last


def test_wrong_settings_are_named(checkout, tmp_path):
    assert "M3BIND_CUDA=MAYBE: choose one of AUTO, ON, OFF" in setup(
        checkout, "build_ext", M3BIND_CUDA="maybe"
    )
    assert f"M3BIND_TORCH_DIR={tmp_path} has no include" in setup(
        checkout, "build_ext", M3BIND_TORCH_DIR=str(tmp_path)
    )


def test_cuda_on_without_a_compiler_says_what_is_missing(checkout, tmp_path):
    hidden = {"M3BIND_CUDA": "ON", "CUDACXX": "", "PATH": str(Path(sys.executable).parent)}
    for name in ("c++", "g++", "gcc", "cc", "ninja", "cmake", "ld", "as", "ar", "git"):
        if (found := shutil.which(name)) is not None:
            (tmp_path / name).symlink_to(found)
    done = build(checkout, tmp_path, **hidden | {"PATH": str(tmp_path)})
    assert done.returncode != 0
    told = done.stdout + done.stderr
    assert ("there is no nvcc" if torch.version.cuda else "torch is built without CUDA") in told


FAKE_CMAKE = """#!{python}
import sys, sysconfig
from pathlib import Path
for word in sys.argv:
    if word.startswith("-DCMAKE_LIBRARY_OUTPUT_DIRECTORY="):
        for name in {modules}:
            Path(word.partition("=")[2], name + sysconfig.get_config_var("EXT_SUFFIX")).touch()
"""


def test_the_cuda_module_stands_beside_the_other_after_a_build_in_place(checkout, tmp_path):
    cmake = tmp_path / "cmake"
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    for modules in (["_C", "_C_cuda"], ["_C"]):  # and goes with a build that has none
        cmake.write_text(FAKE_CMAKE.format(python=sys.executable, modules=modules))
        cmake.chmod(0o755)
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=checkout, env={**os.environ, "PATH": path}, check=True, capture_output=True,
        )  # fmt: skip
        found = {file.name.partition(".")[0] for file in (checkout / "m3bind").glob("*.so")}
        assert found == set(modules)
