"""Fingerprints of the sources that kernels are made of, to tell whether they changed since.

The standard library alone: setup.py reads this file too, and stamps the compiled modules.
"""

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

# Of the repository. The flags of CUDA's compiler decide what a kernel computes, too.
NATIVE = {"cpp": ("csrc/cpu",), "cuda": ("csrc/cuda", "CMakeLists.txt")}


def digest(base: Path, files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for name, file in sorted((file.relative_to(base).as_posix(), file) for file in files):
        content = file.read_bytes()
        total.update(f"{name} {len(content)}\n".encode() + content)
    return total.hexdigest()[:16]


def of_native(root: Path, backend: str) -> str | None:
    """Of "cpp" or "cuda" in a checkout; None where nothing is written."""
    places = [root / name for name in NATIVE[backend]]
    if not places[0].is_dir():
        return None
    inside = [file for place in places if place.is_dir() for file in place.rglob("*.*")]
    return digest(root, inside + [place for place in places if place.is_file()])


def cuda_operators(root: Path) -> tuple[str, ...]:
    """The primitives that csrc/cuda of a checkout has kernels for."""
    text = (root / "csrc" / "cuda" / "module.cpp").read_text()
    found = re.search(r'"operators"\)\s*=\s*pybind11::make_tuple\(([^)]*)\)', text)
    assert found is not None
    return tuple(re.findall(r'"(\w+)"', found[1]))


def of_package(folder: Path, primitive: str) -> str:
    """Of the modules in a package that export `<primitive>_...`, with all that they import there;
    of the whole package where none does."""
    exporting = [
        module for module, names in imports(folder, folder / "__init__.py")
        if any(name.startswith(f"{primitive}_") for name in names)
    ]  # fmt: skip
    if not exporting:
        return digest(folder, folder.glob("*.py"))
    found: set[Path] = set()
    while exporting:
        module = exporting.pop()
        if module not in found:
            found.add(module)
            exporting += [other for other, _ in imports(folder, module)]
    return digest(folder, found)


def imports(folder: Path, module: Path) -> list[tuple[Path, list[str]]]:
    """The modules of the same package that one imports, and the names that it takes from each."""
    found = []
    for node in ast.walk(ast.parse(module.read_bytes())):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        package, _, last = node.module.rpartition(".")
        names = [alias.name for alias in node.names]
        if package.split(".")[-1] == folder.name:
            found.append((folder / f"{last}.py", names))
        elif last == folder.name:
            found += [(folder / f"{name}.py", []) for name in names]
    return [(path, names) for path, names in found if path.is_file()]
