"""Stage 1 as a program: killed or stopped in the middle, it goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from m3bind.config import load_config
from m3bind.stages import Run
from m3bind.train import has_checkpoint


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def start_align(settings: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "m3bind", "align", "-c", str(settings), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        log = folder / "metrics.jsonl"
        if log.is_file() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture
def two_experts(settings) -> Path:
    """Settings for what starts processes, which takes long enough."""
    given = yaml.safe_load(settings.read_text())
    del given["experts"]["retina"]
    settings.write_text(yaml.safe_dump(given))
    return settings


LONG = ("align.steps=16", "align.validate_every=4", "align.checkpoint_every=2")
CACHED = tuple(f"experts.{m}.image.cache=true" for m in ("xray", "ecg"))


@pytest.mark.parametrize(
    "more",
    # Images in training processes of their own that are killed: also in tests/test_train.py.
    [
        pytest.param((), marks=pytest.mark.slow, id="images"),
        pytest.param(CACHED, id="kept features"),
    ],
)
def test_sigkill_then_resume_gives_the_same_losses_to_the_bit(two_experts, tmp_path, more):
    long = (*LONG, *more)
    Run(load_config(two_experts, list(long))).align()  # in this process, as it is not to be killed
    folder = tmp_path / "run" / "align"
    undisturbed = losses(folder)
    weights = (folder / "xray" / "model.safetensors").read_bytes()
    assert [step for step, _ in undisturbed] == list(range(1, 17))

    other = f"output={tmp_path / 'killed'}"
    folder = tmp_path / "killed" / "align"
    killed = start_align(two_experts, *long, other)
    wait_for_step(folder, 5, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert losses(folder)[-1][0] < 16
    resumed = start_align(two_experts, *long, other, "--resume")
    assert resumed.wait(180) == 0, resumed.communicate()[1]
    assert losses(folder) == undisturbed
    assert (folder / "xray" / "model.safetensors").read_bytes() == weights


def test_ctrl_c_writes_a_checkpoint_and_ends_with_one_line(two_experts, tmp_path):
    process = start_align(two_experts, "align.steps=2000", "align.checkpoint_every=1000")
    folder = tmp_path / "run" / "align"
    wait_for_step(folder, 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    last = errors.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("m3bind: align: stopped at step") and "--resume" in last
    assert has_checkpoint(folder)
