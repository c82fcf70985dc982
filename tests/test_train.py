"""The training loop: what it minimises, writes, keeps, and how it survives being stopped."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from m3bind.checkpoint import load_checkpoint
from m3bind.data.records import Record
from m3bind.data.shard_writer import ShardWriter
from m3bind.errors import Interrupted, M3BindError
from m3bind.tracking import read_history
from m3bind.train import fit, load_best, schedule

import train_run  # isort: skip
from train_stub import Stub, StubLoader, config, quadratic  # isort: skip

RUN = Path(train_run.__file__)


def test_the_sum_of_the_losses_is_minimised_by_adamw(tmp_path) -> None:
    settings = config(steps=20, clip=0.5, weight_decay=0.1)
    task = Stub(quadratic)
    result = fit(task, {"stub": StubLoader()}, settings, tmp_path)
    expected = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.AdamW([expected], lr=0.1, weight_decay=0.1)
    losses = []
    for step in range(1, 21):
        optimizer.param_groups[0]["lr"] = 0.1 * schedule(step, 2, 20)
        optimizer.zero_grad()
        parts = quadratic(expected, 0).values()
        sum(parts).backward()
        torch.nn.utils.clip_grad_norm_([expected], 0.5)
        optimizer.step()
        losses.append(sum(part.item() for part in parts))
    assert torch.equal(task.weight, expected)
    assert [line["loss"] for line in result.history] == losses
    assert (result.steps, result.best_step) == (20, 20) and math.isnan(result.best_score)
    assert result.history[0]["losses"] == {"a": 1.0, "b": 4.0}
    assert result.history[0]["report"] == {"note": 1.0}


def test_warm_up_is_linear_and_the_cosine_ends_above_zero() -> None:
    factors = [schedule(step, 4, 20) for step in range(1, 21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3:] == sorted(set(factors[3:]), reverse=True) and factors[-1] > 0
    assert schedule(12, 4, 20) == pytest.approx(0.5 * (1 + math.cos(math.pi * 8 / 17)))
    assert schedule(1, 0, 1) > 0


def test_the_best_validated_weights_are_kept_and_given_back(tmp_path) -> None:
    task = Stub(quadratic)
    seen: dict[int, tuple[float, float]] = {}
    scores = iter([0.2, 0.9, 0.5, 0.4])

    def validate() -> dict[str, float]:
        assert not task.training and not torch.is_grad_enabled()
        score = next(scores)
        seen[len(seen)] = (score, task.weight.item())
        return {"score": score, "other": 1.0}

    result = fit(task, {"stub": StubLoader()}, config(), tmp_path, validate=validate)
    assert (result.best_step, result.best_score) == (6, 0.9)  # of steps 3, 6, 9 and 10
    assert task.weight.item() == seen[1][1] != seen[3][1]
    assert all(task.modes)
    validated = [line["step"] for line in result.history if "validation" in line]
    assert validated == [3, 6, 9, 10]
    other = Stub(quadratic)
    assert load_best(other, tmp_path) == 6 and torch.equal(other.weight, task.weight)
    # The last weights are in the other checkpoint.
    assert load_checkpoint(tmp_path / "checkpoints/last.safetensors")[1]["step"] == 10


def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path) -> None:
    scores = iter([math.nan, 0.1, math.nan, math.nan])
    result = fit(
        Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path,
        validate=lambda: {"score": next(scores)},
    )  # fmt: skip
    assert (result.best_step, result.best_score) == (6, 0.1)


def test_without_any_score_the_last_weights_are_kept(tmp_path) -> None:
    trained = Stub(quadratic)
    fit(trained, {"stub": StubLoader()}, config(), tmp_path / "without")
    task = Stub(quadratic)
    result = fit(
        task, {"stub": StubLoader()}, config(), tmp_path / "with",
        validate=lambda: {"score": math.nan},
    )  # fmt: skip
    assert result.best_step == 10 and math.isnan(result.best_score)
    assert torch.equal(task.weight, trained.weight)
    assert not any("validation" in line for line in result.history)
    assert load_best(Stub(quadratic), tmp_path / "with") == 10


def test_a_loss_that_is_not_finite_is_named(tmp_path) -> None:
    def function(weight, number):
        return {**quadratic(weight, number), "c": weight.sum() * (math.nan if number == 6 else 1)}

    with pytest.raises(
        M3BindError, match=r"step 6: the loss 'c' is nan: lower lr \(0.1\)"
    ) as error:
        fit(Stub(function), {"stub": StubLoader()}, config(), tmp_path)
    assert "\n" not in str(error.value) and "last.safetensors" in str(error.value)
    sections, data = load_checkpoint(tmp_path / "checkpoints/last.safetensors")
    assert data["step"] == 4 and torch.isfinite(sections["model"]["weight"]).all()


def test_a_gradient_that_is_not_finite_is_named(tmp_path) -> None:
    def function(weight, number):
        return {"root": (weight - weight.detach()).abs().sqrt().sum()}  # 0, with slope infinity

    with pytest.raises(M3BindError, match="step 1: the gradient's norm is nan"):
        fit(Stub(function), {"stub": StubLoader()}, config(), tmp_path)


def test_bf16_autocast(tmp_path) -> None:
    dtypes = []

    def function(weight, number):
        dtypes.append((weight[None] @ weight[:, None]).dtype)
        return quadratic(weight, number)

    fit(Stub(function), {"stub": StubLoader()}, config(steps=1, bf16=True), tmp_path / "a")
    fit(Stub(function), {"stub": StubLoader()}, config(steps=1), tmp_path / "b")
    assert dtypes == [torch.bfloat16, torch.float32]


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
    with pytest.raises(Interrupted, match=r"stopped at step 6 of 10; .*--resume") as error:
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


def test_resume_refuses_other_settings_and_other_modalities(tmp_path) -> None:
    out = tmp_path
    fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path)
    with pytest.raises(M3BindError, match=r"trained with lr = 0.1, now it is 0.2"):
        fit(Stub(quadratic), {"stub": StubLoader()}, config(lr=0.2), tmp_path, resume=True)
    for more in ({"lora.alpha": 4}, {"lora.alpha": 8}):  # not there before, and another value
        with pytest.raises(M3BindError, match=rf"lora.alpha = .*, now it is {more['lora.alpha']}"):
            fit(Stub(quadratic), {"stub": StubLoader()}, config(), out, settings=more, resume=True)
        out = tmp_path / "other"
        fit(Stub(quadratic), {"stub": StubLoader()}, config(), out, settings={"lora.alpha": 4})
    with pytest.raises(M3BindError, match="trained on stub, not on other"):
        fit(Stub(quadratic), {"other": StubLoader()}, config(), tmp_path, resume=True)
    # Nothing was lost by asking, and a finished run is simply given back.
    task = Stub(quadratic)
    result = fit(task, {"stub": StubLoader()}, config(log_every=7), tmp_path, resume=True)
    assert result.steps == 10 and task.modes == [] and task.weight.item() != 1.0


def test_resume_without_a_checkpoint_begins_and_a_new_run_keeps_the_old_aside(tmp_path) -> None:
    first = fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path, resume=True)
    assert first.steps == 10
    fit(Stub(quadratic), {"stub": StubLoader()}, config(steps=4), tmp_path)
    assert load_checkpoint(tmp_path / "checkpoints/last.safetensors")[1]["step"] == 4
    assert load_checkpoint(tmp_path / "checkpoints.previous/last.safetensors")[1]["step"] == 10
    assert [line["step"] for line in read_history(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_checkpoint_of_another_model_is_refused(tmp_path) -> None:
    fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path)
    other = Stub(quadratic)
    other.load_trainable_state = lambda state: (_ for _ in ()).throw(ValueError("no such key"))
    with pytest.raises(M3BindError, match="does not fit the model: no such key"):
        fit(other, {"stub": StubLoader()}, config(), tmp_path, resume=True)


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
    stopped = load_checkpoint(tmp_path / "killed/checkpoints/last.safetensors")[1]["step"]
    assert 3 <= stopped < train_run.CONFIG["steps"]
    result = train_run.run(shards, tmp_path / "killed", resume=True)
    lines = read_history(tmp_path / "killed/metrics.jsonl")
    assert without_seconds(lines) == without_seconds(expected.history)
    assert len([line for line in lines if "loss" in line]) == train_run.CONFIG["steps"]
    assert (result.best_step, result.best_score) == (expected.best_step, expected.best_score)
    for name in ("last", "best"):
        a, b = (
            load_checkpoint(tmp_path / run / f"checkpoints/{name}.safetensors")[0]
            for run in ("whole", "killed")
        )
        assert a.keys() == b.keys()
        for section in a:
            for key, tensor in a[section].items():
                assert torch.equal(tensor, b[section][key]), (name, section, key)


def test_ctrl_c_ends_the_program_with_one_line_and_a_checkpoint(shards, tmp_path) -> None:
    process = start(shards, tmp_path, 0.1)
    wait_for_lines(tmp_path, 5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and out.count("\n") == 1 and "stopped at step" in out
    assert "Traceback" not in err
    data = load_checkpoint(tmp_path / "checkpoints/last.safetensors")[1]
    assert f"step {data['step']} of" in out


def test_batches_move_to_the_device_of_the_task() -> None:
    batch = next(iter(StubLoader()))
    moved = batch.to("meta")
    assert moved.images.device.type == "meta" and batch.images.device.type == "cpu"
    assert moved.reports == ["r"] and len(moved) == 1


def test_a_step_is_the_mean_of_accumulated_batches(tmp_path) -> None:
    def function(weight, number):
        return {"a": ((weight - number) ** 2).sum()}

    task = Stub(function)
    settings = config(steps=2, warmup=0, clip=0, accumulate=3)
    result = fit(task, {"stub": StubLoader()}, settings, tmp_path)
    expected = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.AdamW([expected], lr=0.1, weight_decay=settings.weight_decay)
    for step, numbers in ((1, (1, 2, 3)), (2, (4, 5, 6))):
        optimizer.param_groups[0]["lr"] = 0.1 * schedule(step, 0, 2)
        optimizer.zero_grad()
        loss = sum(((expected - n) ** 2).sum() for n in numbers) / 3
        loss.backward()
        optimizer.step()
        assert result.history[step - 1]["loss"] == pytest.approx(loss.item())
    assert task.weight.item() == pytest.approx(expected.item(), rel=1e-6)


def test_what_torchrun_starts_again_goes_on_with_this_run_and_no_other(
    tmp_path, monkeypatch
) -> None:
    def steps_taken(by_torchrun: bool) -> int:
        if by_torchrun:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "17")
        else:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        task = Stub(quadratic)
        fit(task, {"stub": StubLoader()}, config(steps=4, checkpoint_every=1), tmp_path)
        return len(task.modes)

    assert steps_taken(by_torchrun=True) == 4
    assert steps_taken(by_torchrun=True) == 0  # nothing is left to do
    last = tmp_path / "checkpoints" / "last.safetensors"
    os.utime(last, (1, 1))  # from before torchrun, here this process's parent, was started
    assert steps_taken(by_torchrun=True) == 4
    assert steps_taken(by_torchrun=False) == 4  # started by hand
    history = read_history(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in history] == [1, 2, 3, 4]
