"""What the tests of `make gpu` share: a machine with little on it, and what is recorded on one."""

from pathlib import Path

from m3bind import backends

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
# What the machine with the GPU lacks.
MISSING = (
    "typer", "rich", "open_clip", "hypothesis", "nvidia.dali", "omegaconf", "tqdm", "sklearn",
    "scipy", "timm", "transformers", "peft", "torchvision", "faiss", "inf_cl", "cut_cross_entropy",
    "torchmetrics", "matplotlib", "skimage", "PIL", "safetensors", "webdataset", "pydicom",
    "nibabel", "wfdb", "sentence_transformers",
)  # fmt: skip
BLOCKER = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name in {MISSING!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


def row(op: str = "clip_loss", backend: str = "triton", **changed) -> dict:
    searches = op in ("similarity_topk", "similarity_rank")
    primitive = backends.BUILT_ON[op]
    return {
        "op": op, "backend": backend, "n": 32768, "m": 32768, "d": 512, "dtype": "bf16",
        "pass": "forward" if searches else "both", "ms_median": 7.0, "ms_min": 6.5,
        "tflops": 600.0, "share_of_gemm": 0.8, "peak_mib": 200.0, "extra_mib": 100.0,
        "error": 0.004, "reference_error": 0.004, "error_rows": 4096, "deterministic": True,
        "rounds": 5, "setting": "bf16 features, fp32 logits", "problem": "",
        "sources": backends.installed_sources(primitive, backend), **changed,
    }  # fmt: skip


def group(backend: str = "triton", **changed) -> dict:
    return {
        "file": "test_on_device", "operator": "clip_loss", "backend": backend, "dtype": "bfloat16",
        "passed": 5, "failed": 0, "skipped": 0, "not finished": 0, "messages": [], **changed,
    }  # fmt: skip
