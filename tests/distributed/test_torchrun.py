"""Stage 1 on ranks that torchrun started: one is lost, and the training goes on."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from train_stub import kept

from m3bind.config import load_config
from m3bind.stages import Run
from m3bind.train.index import read_checkpoint

# Without dropout, on kept features: then any number of ranks computes the same.
EXACT = [
    f"experts.{m}.{setting}"
    for m in ("xray", "retina", "ecg")
    for setting in ("image.cache=true", "lora=null", "text.train_layers=0")
]
LONG = ["align.steps=12", "align.validate_every=4", "align.checkpoint_every=2"]


@pytest.fixture(scope="module")
def alone(write_settings, tmp_path_factory) -> Run:
    """A run in one process, whose kept features and hidden states others need not compute again."""
    settings = write_settings(tmp_path_factory.mktemp("alone"))
    run = Run(load_config(settings, [*LONG, *EXACT]))
    run.align()
    return run


def beside(run: Run, folder: Path) -> Path:
    for part in ("text_cache", "features"):
        shutil.copytree(run.folder / part, folder / part)
    return folder


def start(
    settings: Path, ranks: int, *more: str, restarts: int = 0, command: str = "align",
    meeting: tuple[str, ...] = ("--standalone",),
) -> subprocess.Popen:  # fmt: skip
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", *meeting,
            f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", "-m", "m3bind", command,
            "-c", str(settings), *more,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]
    return output


def losses(folder: Path, stage: str = "align") -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / stage / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def wait_for(step: int, log: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not (log.is_file() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def children(process: subprocess.Popen, command: str) -> list[psutil.Process]:
    """The ranks, in their order."""
    found = [p for p in psutil.Process(process.pid).children() if command in p.cmdline()]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


def kill_after(step: int, folder: Path, process: subprocess.Popen) -> float:
    """SIGKILL to the last rank once a step is logged; when that was."""
    wait_for(step, folder / "align" / "metrics.jsonl", process)
    children(process, "align")[-1].send_signal(signal.SIGKILL)
    return time.monotonic()


def same_losses(folder: Path, alone: Run) -> None:
    got, want = losses(folder), losses(alone.folder)
    assert [step for step, _ in got] == [step for step, _ in want]
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in want], rel=2e-4)


@pytest.mark.parametrize(("ranks", "fewer"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_a_lost_rank_ends_the_others_and_fewer_go_on(alone, settings, tmp_path, ranks, fewer):
    cut = beside(alone, tmp_path / "cut")
    process = start(settings, ranks, *LONG, *EXACT, "align.parallel=fsdp", f"output={cut}")
    killed = kill_after(5, cut, process)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - killed < 30 and process.returncode != 0
    told = set(re.findall(rf"m3bind: rank (\d): .*: rank {ranks - 1} ended; torchrun", output))
    assert told == set(map(str, range(ranks - 1))), output[-4000:]
    assert 4 <= read_checkpoint(cut / "align")["step"] < 12
    said = finished(start(settings, fewer, *LONG, *EXACT, f"output={cut}", "--resume"))
    assert said.count("best score") == 1
    # With FSDP, then with DDP: the losses are those of one process.
    same_losses(cut, alone)


# Its fast sibling: test_what_torchrun_starts_again_goes_on_with_this_run_and_no_other.
@pytest.mark.slow
@pytest.mark.parametrize("more", [["fsdp", 2], ["ddp", 1]], ids=["fsdp", "ddp"])
def test_a_lost_rank_of_four_is_started_again(settings, tmp_path, more):
    """With streams of images and dropout: the bits of a run that loses none."""
    parallel, accumulate = more
    given = [
        f"align.parallel={parallel}", f"align.accumulate={accumulate}", "align.batch_size=8",
    ]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finished(start(settings, 4, *LONG, *given, f"output={whole}"))
    process = start(settings, 4, *LONG, *given, f"output={cut}", restarts=1)
    kill_after(5, cut, process)
    assert "rank 3 ended; torchrun goes on" in finished(process)
    # It went on: a start from nothing would have set the checkpoint aside.
    assert not (cut / "align" / "checkpoints.previous").exists()
    assert losses(cut) == losses(whole)
    for name in ("xray", "retina", "ecg"):
        weights = [f / "align" / name / "model.safetensors" for f in (whole, cut)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_one_expert_on_each_rank(alone, settings, tmp_path):
    """From nothing: hidden states that experts share are computed once, by whoever needs them."""
    split = tmp_path / "split"
    output = finished(start(settings, 3, *LONG, *EXACT, "align.placement=split", f"output={split}"))
    assert len(re.findall("frozen text layers: +0%", output)) == 3  # one for each modality's texts
    want = [loss for _, loss in losses(alone.folder)]
    assert [loss for _, loss in losses(split)] == pytest.approx(want, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ("split", "replicated"))
def test_distill_over_ranks(alone, settings, tmp_path, placement):
    """The student spread over all ranks, with its last layers training: it validates, stops at a
    step that is due for it, and goes on."""
    out = beside(alone, tmp_path / "out")
    log = out / "control" / "metrics.jsonl"
    more = [
        "--control", *(s for s in EXACT if "image.cache" in s), "distill.parallel=fsdp",
        f"distill.placement={placement}", "distill.steps=200", "distill.validate_every=1",
        "distill.checkpoint_every=1000", f"output={out}",
    ]  # fmt: skip
    process = start(settings, 3, *more, command="distill")
    wait_for(2, log, process)
    for each in (process, *children(process, "distill")):  # as a scheduler does
        each.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    (stopped,) = re.findall(r"m3bind: control: stopped at step (\d+) of 200", output)
    resumed = start(settings, 3, *more, "--resume", command="distill")
    wait_for(int(stopped) + 2, log, resumed)
    resumed.send_signal(signal.SIGTERM)
    assert "control: stopped at step" in resumed.communicate(timeout=60)[0]


@pytest.mark.slow
def test_two_machines(alone, settings, tmp_path):
    """Two torchruns that meet as those of two machines do; a rank of the second one is lost."""
    whole = beside(alone, tmp_path / "out")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    meeting = (
        "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=17", f"--rdzv-endpoint={endpoint}",
    )  # fmt: skip
    machines = [
        start(settings, 2, *LONG, *EXACT, f"output={whole}", restarts=2, meeting=meeting)
        for _ in range(2)
    ]
    wait_for(5, whole / "align" / "metrics.jsonl", machines[0])
    (last,) = (p for m in machines for p in children(m, "align") if p.environ()["RANK"] == "3")
    last.send_signal(signal.SIGKILL)
    said = "".join(map(finished, machines))
    assert "rank 3 ended; torchrun goes on" in said and said.count("best score") == 1
    assert not (whole / "align" / "checkpoints.previous").exists()
    same_losses(whole, alone)


@pytest.mark.slow
def test_an_expert_is_pretrained_over_ranks(settings, tmp_path):
    """Images stream to both ranks; what was stopped and goes on repeats what never stopped."""
    runs = {}
    for name in ("whole", "cut"):
        out = tmp_path / name
        more = [
            "--modality", "xray", "pretrain.steps=8", "pretrain.validate_every=4",
            "pretrain.checkpoint_every=1", "pretrain.batch_size=8", f"output={out}",
        ]  # fmt: skip
        process = start(settings, 2, *more, command="pretrain")
        if name == "cut":
            wait_for(3, out / "pretrain" / "xray" / "metrics.jsonl", process)
            process.send_signal(signal.SIGTERM)
            assert "pretrain/xray: stopped at step" in process.communicate(timeout=60)[0]
            process = start(settings, 2, *more, "--resume", command="pretrain")
        finished(process)
        runs[name] = losses(out, "pretrain/xray")
        weights = out / "pretrain" / "xray" / "model.safetensors"
        runs[name].append(hashlib.sha256(weights.read_bytes()).hexdigest())
    assert len(runs["whole"]) == 9 and runs["cut"] == runs["whole"]
    last, again = (kept(tmp_path / name / "pretrain" / "xray") for name in ("whole", "cut"))
    assert last.keys() == again.keys() and any("running_var" in name for name in last)
    for name, tensor in last.items():
        # NumPy's and Python's own generators begin anywhere, and nothing is drawn from them here.
        if not name.endswith(("/plain", "/numpy")):
            assert torch.equal(tensor, again[name]), name


def test_one_process_commands_are_refused(settings):
    done = subprocess.run(
        [sys.executable, "-m", "m3bind", "eval", "-c", str(settings)],
        env={**os.environ, "WORLD_SIZE": "2", "RANK": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        "m3bind: rank 1: m3bind eval runs in one process; torchrun starts pretrain, align, distill "
        "on several\n"
    )
