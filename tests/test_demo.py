"""`m3bind demo`: stopped while it pretrains, continued, and carried to its end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m3bind.tracking import read_history
from m3bind.train import has_checkpoint

SETTINGS = (
    "phantom.train=16", "phantom.val=8", "phantom.test=8", "phantom.workers=2",
    "pretrain.batch_size=8", "pretrain.validate_every=4", "align.steps=4", "align.batch_size=8",
    "align.centre_batch=16", "align.validate_every=4", "distill.steps=4", "distill.batch_size=8",
    "distill.validate_every=4", "evaluation.permutations=20", "evaluation.seeds=2",
)  # fmt: skip


def demo(output: Path, *settings: str) -> list[str]:
    return [sys.executable, "-m", "m3bind", "demo", "--output", str(output), *SETTINGS, *settings]


def wait_for(found, process: subprocess.Popen, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, process.poll()
        time.sleep(0.2)


def stop_while_pretraining(output: Path) -> subprocess.CompletedProcess:
    """Ctrl-C, as a terminal sends it, once two experts have made a step."""
    logs = output / "pretrain"
    with subprocess.Popen(
        demo(output, "pretrain.steps=100000", "pretrain.log_every=1"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        wait_for(
            lambda: len(list(filter(read_history, logs.glob("*/metrics.jsonl")))) >= 2, process
        )
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess([], process.returncode, out, err)


def test_ctrl_c_stops_it_with_one_line_and_starts_nothing_more(tmp_path):
    output = tmp_path / "run"
    stopped = stop_while_pretraining(output)
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    last = stopped.stderr.strip().splitlines()[-1]
    assert last == (
        f"m3bind: stopped while pretraining; m3bind demo --output {output} --resume continues"
    )
    started = {path.name for path in (output / "pretrain").iterdir()}
    assert len(started) == 2 and "ct" in started
    assert all(has_checkpoint(output / "pretrain" / name) for name in started)


@pytest.mark.slow  # fast siblings: the test above, and tests/test_path.py for each stage
def test_to_the_end(tmp_path):
    output = tmp_path / "run"
    done = subprocess.run(
        demo(output, "pretrain.steps=8"), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].endswith(str(output / "report.html"))
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["simulated"] and set(metrics["zero_shot"]) >= {"before", "aligned", "distilled"}


def test_its_folder_is_named_in_one_way():
    refused = subprocess.run(
        [sys.executable, "-m", "m3bind", "demo", "output=elsewhere"], capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "name the demo's folder with --output instead" in refused.stderr
