"""Which backend runs an operator: by itself, by the environment, by `use_backend`, by name."""

import os
import subprocess
import sys
from types import SimpleNamespace

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


def test_cuda_says_for_which_processors_it_is_built(monkeypatch):
    built = SimpleNamespace(operators=("siglip",), architectures=("sm_90",), sources="x")
    monkeypatch.setattr(backends, "native_cuda", lambda: built)
    for here, reason in (
        (("sm_90",), None),
        ((), None),  # no GPU is asked for before there is one
        (("sm_80", "sm_90"), "its kernels are built for sm_90, not for sm_80: triton has others"),
    ):
        monkeypatch.setattr(backends, "architectures", lambda here=here: here)
        assert backends.why_not("siglip_loss", "cuda", "cuda", torch.bfloat16) == reason
    assert "has no similarity_topk" in str(
        backends.why_not("similarity_topk", "cuda", "cuda", torch.bfloat16)
    )
    monkeypatch.setattr(backends, "architectures", lambda: ("sm_90",))
    assert "it takes bfloat16, float16, not float32" in str(
        backends.why_not("siglip_loss", "cuda", "cuda", torch.float32)
    )
