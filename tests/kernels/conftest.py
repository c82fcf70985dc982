"""Triton kernels run in a process of their own under the interpreter, and on a GPU where one is."""

import os
import sys
from pathlib import Path

import torch
import triton.language as tl
from triton.runtime import interpreter

# The oracles of the operators' tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
# cuBLAS is deterministic only with a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def patch_once() -> None:
    """The interpreter patches Triton's language at every call of a jitted function from another,
    where it is patched already; more than half of these tests' time would go there."""
    patch = interpreter._patch_lang
    modules: dict[int, list] = {}

    def patch_where_needed(function):
        scope = function.__globals__
        if id(scope) not in modules:
            modules[id(scope)] = [m for m in (tl, tl.core) if any(m is v for v in scope.values())]
        if any(tl.core.is_builtin(module.load) for module in modules[id(scope)]):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_where_needed


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    # This is the process that test_triton_interpreter.py starts.
    patch_once()
    collect_ignore = [
        "test_triton_choice.py",
        "test_triton_compile.py",
        "test_triton_compile_kept.py",
        "test_triton_compile_pairs.py",
        "test_triton_compile_search.py",
        "test_triton_interpreter.py",
    ]
elif not torch.cuda.is_available():
    collect_ignore = [
        "test_triton_distill.py",
        "test_triton_kept.py",
        "test_triton_search.py",
        "test_triton_siglip.py",
        "test_triton_stats.py",
    ]
