"""A training that is stopped, by signals or at once, and goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train_run
from train_stub import Stub, StubLoader, config, kept, quadratic

from m3bind.data.records import Record
from m3bind.data.shard_writer import ShardWriter
from m3bind.errors import Interrupted
from m3bind.tracking import read_history
from m3bind.train import fit
from m3bind.train.index import read_checkpoint

RUN = Path(train_run.__file__)


def stopped_at(number: int, signum: int = signal.SIGINT):
    def function(weight, given):
        if given == number:
            os.kill(os.getpid(), signum)
        return quadratic(weight, given)

    return function


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(tmp_path, signum) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    scores = [0.1, 0.2, 0.7, 0.3]

    def run(out: Path, function, resume: bool, first: int = 0):
        left = iter(scores[first:])
        task = Stub(function)
        result = fit(
            task, {"stub": StubLoader()}, config(), out,
            validate=lambda: {"score": next(left)}, resume=resume,
        )  # fmt: skip
        return task, result

    whole, expected = run(tmp_path / "whole", quadratic, False)
    with pytest.raises(Interrupted, match=r"stopped at step 6 of 10, .*--resume") as error:
        run(tmp_path / "cut", stopped_at(6, signum), False)
    assert "\n" not in str(error.value)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    # Step 6 was due for validation and stopped before it: the resumed run begins with it.
    task, result = run(tmp_path / "cut", quadratic, True, first=1)
    assert torch.equal(task.weight, whole.weight)
    assert without_seconds(result.history) == without_seconds(expected.history)
    assert (result.best_step, result.best_score) == (expected.best_step, 0.7)


def test_the_second_ctrl_c_stops_at_once(tmp_path) -> None:
    def function(weight, number):
        if number == 3:
            # Handled one by one: two that a process sends itself may arrive as one.
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            time.sleep(5)
        return quadratic(weight, number)

    with pytest.raises(KeyboardInterrupt):
        fit(Stub(function), {"stub": StubLoader()}, config(), tmp_path)


def without_seconds(lines: list[dict]) -> list[dict]:
    measured = ("seconds", "samples_per_second", "peak_mib")
    return [{k: value for k, value in line.items() if k not in measured} for line in lines]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    pytest.importorskip("nvidia.dali")
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardWriter(root, "simulated", "xray", "train", 5) as writer:
        for i in range(11):
            pixels = rng.integers(0, 256, (20, 20)).astype(np.uint8)
            writer.write(
                Record.from_image(
                    pixels,
                    id=f"x{i}",
                    patient=f"p{i}",
                    modality="xray",
                    split="train",
                    report="FINDINGS: none.",
                    simulated=True,
                )
            )
    return root


def start(shards: Path, out: Path, delay: float, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(RUN), str(shards), str(out), str(delay), *more]
    env = {**os.environ, "PYTHONPATH": str(RUN.parents[1])}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_lines(out: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.time() + 120
    while len(read_history(out / "metrics.jsonl")) < count:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)


def test_sigkill_then_resume_is_bit_equal_to_never_stopping(shards, tmp_path) -> None:
    expected = train_run.run(shards, tmp_path / "whole")
    process = start(shards, tmp_path / "killed", 0.1)
    wait_for_lines(tmp_path / "killed", 13, process)
    process.kill()
    process.communicate()
    stopped = read_checkpoint(tmp_path / "killed")["step"]
    assert 3 <= stopped < train_run.CONFIG["steps"]
    result = train_run.run(shards, tmp_path / "killed", resume=True)
    lines = read_history(tmp_path / "killed/metrics.jsonl")
    assert without_seconds(lines) == without_seconds(expected.history)
    assert len([line for line in lines if "loss" in line]) == train_run.CONFIG["steps"]
    assert (result.best_step, result.best_score) == (expected.best_step, expected.best_score)
    for which in ("last", "best"):
        a, b = (kept(tmp_path / run, which) for run in ("whole", "killed"))
        assert a.keys() == b.keys()
        for name, tensor in a.items():
            assert torch.equal(tensor, b[name]), (which, name)


def test_ctrl_c_ends_the_program_with_one_line_and_a_checkpoint(shards, tmp_path) -> None:
    process = start(shards, tmp_path, 0.1)
    wait_for_lines(tmp_path, 5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and out.count("\n") == 1 and "stopped at step" in out
    assert "Traceback" not in err
    assert f"step {read_checkpoint(tmp_path)['step']} of" in out
