"""Which backend runs an operator: by itself, by the environment, by `use_backend`, by name."""

import os
import subprocess
import sys

import pytest
import torch
from clip_oracle import needs_native

from m3bind import backends, use_backend
from m3bind.ops import similarity_topk


@needs_native
def test_environment_variables():
    code = (
        "import torch; from m3bind import backends; print(backends.native());"
        "print(backends.resolve('clip_loss', 'cpu', torch.float32))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "M3BIND_CPU_CAPABILITY": "mmx", "M3BIND_BACKEND": "reference"},
        capture_output=True,
        text=True,
    )
    reason, chosen = done.stdout.splitlines()
    assert "M3BIND_CPU_CAPABILITY=mmx: choose one of" in reason and "default" in reason
    assert chosen == "reference"


@needs_native
def test_choice_of_backend():
    assert backends.resolve("clip_loss", "cpu", torch.float32) == "cpp"
    assert backends.resolve("clip_loss", "cpu", torch.float64) == "chunked"
    with use_backend("chunked"):
        assert backends.resolve("clip_loss", "cpu", torch.float32) == "chunked"
        assert backends.resolve("clip_loss", "cpu", torch.float32, "cpp") == "cpp"
    assert backends.resolve("clip_loss", "cpu", torch.float32) == "cpp"
    with pytest.raises(ValueError, match="unknown backend 'fast'"), use_backend("fast"):
        pass


@needs_native
def test_choice_of_backend_of_similarity_distill():
    assert backends.resolve("similarity_distill", "cpu", torch.bfloat16) == "cpp"
    assert backends.resolve("similarity_distill", "cpu", torch.float64) == "chunked"


def test_use_backend_is_heeded():
    x = torch.ones(3, 2)
    with use_backend("triton"), pytest.raises(ValueError, match="cannot run similarity_topk"):
        similarity_topk(x, x, 1)
