"""On a GPU the fastest verified backend is automatic. GPUs and records are pretended here."""

import json
import subprocess
import sys

import pytest
import torch

from m3bind import backends, info, verified

BF16, FP32 = torch.bfloat16, torch.float32


def entry(backend: str, *, tflops: float = 500.0, sources: str | None = None) -> dict:
    installed = backends.installed_sources("similarity_stats", backend)
    return {
        "device": "NVIDIA H100", "commit": "abc1234", "date": "2026-01-02", "tflops": tflops,
        "sources": sources or installed,
    }  # fmt: skip


@pytest.fixture
def pretend(monkeypatch):
    """Records of clip_loss in bfloat16 by backend on sm_90, and the GPUs that are here."""

    def of(*here: str, architecture: str = "sm_90", **records: dict) -> None:
        by_backend = {name: {"bf16": record} for name, record in records.items()}
        table = {architecture: {"similarity_stats": by_backend}}
        monkeypatch.setattr(verified, "table", lambda: table)
        monkeypatch.setattr(backends, "architectures", lambda: here)
        backends.verified_for.cache_clear()

    yield of
    backends.verified_for.cache_clear()


def chosen(dtype: torch.dtype = BF16, op: str = "clip_loss") -> str:
    return backends.resolve(op, "cuda", dtype)


def test_the_shipped_file_lists_only_what_exists():
    for architecture, primitives in verified.table().items():
        assert architecture.startswith("sm_")
        for primitive, by_backend in primitives.items():
            for backend in by_backend:
                assert backend in backends.TABLE[primitive]
                dtypes = verified.found(architecture, primitive, backend)
                assert set(dtypes) <= set(backends.DTYPE_NAMES.values())


def test_a_verified_backend_is_automatic_in_its_dtype_and_for_its_operators(pretend):
    pretend("sm_90", triton=entry("triton"))
    assert chosen() == chosen(op="similarity_lse") == "triton"
    assert chosen(FP32) == chosen(op="siglip_loss") == "chunked"
    assert backends.resolve("clip_loss", "cpu", BF16) != "triton"
    with backends.use_backend("reference"):
        assert chosen() == "reference"


def test_kernels_that_changed_since_are_not_automatic(pretend):
    pretend("sm_90", triton=entry("triton", sources="0" * 16))
    assert chosen() == "chunked"
    assert info.status("similarity_stats", "triton") == (
        "kernels changed since they were verified on NVIDIA H100 (sm_90) at abc1234, 2026-01-02: "
        "bf16"
    )


def test_on_another_architecture_nothing_is_verified(pretend):
    pretend("sm_80", triton=entry("triton"))
    assert chosen() == "chunked"
    pretend("sm_80", "sm_90", triton=entry("triton"))  # the tensor may be on either
    assert chosen() == "chunked"
    pretend(triton=entry("triton"))  # no GPU
    assert chosen() == "chunked"


def test_the_fastest_of_those_that_are_verified(pretend):
    pretend("sm_90", triton=entry("triton", tflops=300), chunked=entry("chunked", tflops=400))
    assert chosen() == "chunked"
    pretend("sm_90", triton=entry("triton", tflops=500), chunked=entry("chunked", tflops=400))
    assert chosen() == "triton"


def test_what_is_verified_but_not_installed_is_passed_over(pretend, monkeypatch):
    pretend("sm_90", triton=entry("triton"))
    monkeypatch.setattr(backends, "kernels", lambda: "m3bind_kernels does not load: no triton")
    assert chosen() == "chunked"


def test_info_tells_what_was_verified_where(pretend):
    pretend("sm_90", triton=entry("triton"))
    (told,) = (text for name, text in info.support("similarity_stats", "cuda") if name == "triton")
    assert "; verified on NVIDIA H100 (sm_90) at abc1234, 2026-01-02: bf16)" in told
    assert info.status("siglip", "triton") == "not verified on sm_90"


def test_before_any_record_everything_is_not_yet_run(monkeypatch):
    monkeypatch.setattr(verified, "table", dict)
    for primitive in backends.TABLE:
        for backend in backends.BACKENDS:
            assert info.status(primitive, backend) == "not yet run on a GPU"


def test_the_choice_is_a_constant_of_a_compiled_graph(pretend):
    pretend("sm_90", triton=entry("triton"))

    def step(x):
        return x + (1 if backends.resolve("clip_loss", "cuda", torch.bfloat16) == "triton" else 2)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1


def test_importing_and_computing_on_a_cpu_read_no_record_and_no_source():
    code = (
        "import torch, m3bind\n"
        "from m3bind import backends, verified\n"
        "x = torch.ones(3, 2)\n"
        "m3bind.clip_loss(x, x, 1.0)\n"
        "print(verified.table.cache_info().misses, backends.installed_sources.cache_info().misses)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0"]


def test_the_built_extension_carries_the_fingerprint_of_its_sources(tmp_path):
    from m3bind import sources
    from m3bind.resources import PACKAGE

    root, module = PACKAGE.parent, backends.native()
    if isinstance(module, str) or not (root / "csrc").is_dir():
        pytest.skip("no extension, or no checkout")
    assert module.sources == sources.of_native(root, "cpp"), "csrc changed: build again"


def test_a_fingerprint_covers_what_a_kernel_imports_and_nothing_else(tmp_path):
    from m3bind import sources

    folder = tmp_path / "kern"
    folder.mkdir()
    texts = {
        "__init__": "from kern.a import op_fwd\nfrom kern.c import other_fwd\n",
        "a": "from kern import b\nop_fwd = 1\n",
        "b": "",
        "c": "",
    }
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    before = sources.of_package(folder, "op"), sources.of_package(folder, "other")
    (folder / "b.py").write_text("x = 1\n")
    after = sources.of_package(folder, "op"), sources.of_package(folder, "other")
    assert before[0] != after[0] and before[1] == after[1]


def test_the_file_is_json_that_travels_with_the_package():
    assert json.loads(verified.FILE.read_text()) == verified.table()
