"""`import m3bind` brings in nothing of the toolkit; what `m3bind info` tells."""

import subprocess
import sys

import torch

import m3bind
from m3bind import backends, info

HEAVY = ("nvidia.dali", "timm", "transformers", "open_clip", "peft", "torchvision", "torch._dynamo")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_adds_to_torch_only_modules_of_its_own():
    # How long it takes is measured in benchmarks/bench_import.py.
    listed = "import sys, {}; print(*sys.modules)"
    added = set(python(listed.format("m3bind")).split()) - set(
        python(listed.format("torch")).split()
    )
    foreign = {name for name in added if name.partition(".")[0] not in ("m3bind", "m3bind_kernels")}
    assert not foreign - sys.stdlib_module_names


def test_import_brings_in_nothing_heavy():
    code = "import sys, m3bind, m3bind.info; print(*sys.modules)"
    modules = set(python(code).split())
    assert "m3bind.losses" in modules
    assert not modules & set(HEAVY)


def test_info_tells_versions_and_reasons():
    text = info.describe()
    for name in ("python", "m3bind", "torch", "triton", "numpy"):
        assert any(line.startswith(name) for line in text.splitlines()), name
    assert torch.__version__.split("+")[0] in text
    for backend in backends.BACKENDS:
        assert f"  {backend} " in text
    for primitive in backends.TABLE:
        assert info.status(primitive, "triton") in text
    module = backends.native()
    assert (module if isinstance(module, str) else module.cpu_capability) in text


def test_every_backend_is_either_usable_or_explained():
    x = torch.randn(4, 3)
    for op, primitive in backends.BUILT_ON.items():
        for name in backends.BACKENDS:
            reason = backends.why_not(op, name, "cpu", torch.float32)
            outcome = dict(info.support(primitive, "cpu"))[name]
            if reason is None:
                assert "fp32" in outcome
                m3bind.clip_loss(x, x, 1.0, backend=name)
            else:
                assert reason in outcome
