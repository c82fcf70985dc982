"""`import m3bind` is quick and brings in nothing of the toolkit; what `m3bind info` tells."""

import subprocess
import sys

import torch

import m3bind
from m3bind import backends, info

HEAVY = ("nvidia.dali", "timm", "transformers", "open_clip", "peft", "torchvision", "torch._dynamo")
LIMIT = 2.5  # seconds, with torch in the page cache


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_quick():
    # Processor time, not wall time: other jobs may share the machine, and with torch in the page
    # cache an import does not wait. Where torch alone needs the whole limit, m3bind may add little.
    code = "import os, {}; t = os.times(); print(t.user + t.system)"
    whole = float(python(code.format("m3bind")))
    if whole >= LIMIT:
        alone = float(python(code.format("torch")))
        assert whole < 1.15 * alone, (alone, whole)


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
    assert "have not yet run on a GPU" in text
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
