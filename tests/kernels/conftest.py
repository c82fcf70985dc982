"""Triton kernels run in a process of their own under the interpreter, and on a GPU where one is."""

import os
import sys
from pathlib import Path

import torch

# The oracles of the operators' tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
# cuBLAS is deterministic only with a workspace of fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    # This is the process that test_triton_interpreter.py starts.
    import quick_interpreter  # noqa: F401

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
        "test_triton_forward_mode.py",
        "test_triton_kept.py",
        "test_triton_kept_memory.py",
        "test_triton_search.py",
        "test_triton_siglip.py",
        "test_triton_stats.py",
    ]
