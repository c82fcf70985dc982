"""What several test files share: a small simulated cohort and settings for it."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from gpu_cases import BENCHMARKS, BLOCKER, ROOT
from outcomes import pytest_collection_modifyitems, pytest_runtest_logreport  # noqa: F401
from support_table import pytest_runtest_makereport, pytest_sessionfinish  # noqa: F401

SETTINGS = """\
data: {data}
output: {output}
seed: 3
width: 64
threads: 1
experts:
  xray: &expert
    text: {{source: minilm, max_tokens: 24, train_layers: 1, cache: true}}
    lora: {{r: 4, alpha: 4, dropout: 0.1}}
    image: {{size: [48, 48]}}
  retina: *expert
  ecg:
    text: {{source: minilm, max_tokens: 24, train_layers: 1, cache: true}}
    lora: {{r: 4, alpha: 4, dropout: 0.1}}
    image: {{size: [500]}}
pretrain: {{steps: 4, batch_size: 8, warmup: 1, validate_every: 4, log_every: 1}}
align: {{steps: 8, batch_size: 6, centre_batch: 8, warmup: 1, validate_every: 4, log_every: 1,
  checkpoint_every: 2}}
distill: {{steps: 4, batch_size: 6, warmup: 1, validate_every: 4, log_every: 1}}
evaluation: {{shots: [1, 2], seeds: 2, permutations: 20}}
"""


@pytest.fixture(scope="session")
def small_cohort(tmp_path_factory) -> Path:
    """Three modalities of a simulated cohort: 35 training, 14 validation and 14 test patients."""
    from m3bind.data.phantom import make_cohort

    root = tmp_path_factory.mktemp("cohort")
    make_cohort(
        root, seed=3, train=35, val=14, test=14, workers=1, modalities=["xray", "retina", "ecg"]
    )
    return root


@pytest.fixture(scope="session")
def write_settings(small_cohort) -> Callable[[Path], Path]:
    """Writes, into a folder, settings that train on the small cohort into ``<folder>/run``."""

    def write(folder: Path) -> Path:
        path = folder / "settings.yaml"
        path.write_text(SETTINGS.format(data=small_cohort, output=folder / "run"))
        return path

    return write


@pytest.fixture
def settings(write_settings, tmp_path) -> Path:
    """Settings of a run into ``<tmp_path>/run``."""
    return write_settings(tmp_path)


@pytest.fixture
def load(monkeypatch):
    """Imports one of the benchmarks' modules."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a machine with torch, triton and pytest alone."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER)
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path}
