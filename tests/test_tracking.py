"""The logs: JSON lines and TensorBoard, going on after a resume."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from m3bind.errors import M3BindError
from m3bind.tracking import Tracker, read_history


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_lines_and_scalars(tmp_path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": 2.5, "losses": {"a": 1.5, "b": 1.0}})
        tracker.log(2, {"validation": {"score": 0.5}})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == tracker.history == read_history(tmp_path / "metrics.jsonl")
    assert lines[0] == {"step": 1, "loss": 2.5, "losses": {"a": 1.5, "b": 1.0}}
    found = scalars(tmp_path / "tensorboard")
    assert found["losses/a"] == [(1, 1.5)] and found["validation/score"] == [(2, 0.5)]


def test_a_resumed_log_drops_what_came_after_its_step(tmp_path) -> None:
    with Tracker(tmp_path) as tracker:
        for step in range(1, 6):
            tracker.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with Tracker(tmp_path, step=3) as tracker:
        assert [line["step"] for line in tracker.history] == [1, 2, 3]
        tracker.log(4, {"loss": 40.0})
    lines = read_history(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    with Tracker(tmp_path) as tracker:  # from the beginning
        tracker.log(1, {"loss": 9.0})
    assert scalars(tmp_path / "tensorboard")["loss"] == [(1, 9)]


def test_a_validation_that_is_done_again_is_logged_once(tmp_path) -> None:
    """Killed after it, and before the next checkpoint."""
    with Tracker(tmp_path) as tracker:
        for step in (1, 2):
            tracker.log(step, {"loss": float(step)})
            tracker.log(step, {"validation": {"score": 0.5}})
    with Tracker(tmp_path, step=2, validated=1) as tracker:
        tracker.log(2, {"validation": {"score": 0.6}})
    lines = read_history(tmp_path / "metrics.jsonl")
    assert [(line["step"], *line) for line in lines] == [
        (1, "step", "loss"), (1, "step", "validation"), (2, "step", "loss"),
        (2, "step", "validation"),
    ]  # fmt: skip
    assert lines[-1]["validation"]["score"] == 0.6
    found = scalars(tmp_path / "tensorboard")
    assert found["loss"] == [(1, 1), (2, 2)]
    assert found["validation/score"] == [(1, 0.5), (2, pytest.approx(0.6))]


def test_a_log_that_cannot_be_written_says_so(tmp_path) -> None:
    (tmp_path / "run").touch()  # a file where the folder should be
    with pytest.raises(M3BindError, match=r"cannot write .*run: .*: choose another folder"):
        Tracker(tmp_path / "run")


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b'{"loss": 1}\n', b"[1]\n", b"3\n"])
def test_a_resume_goes_on_over_a_damaged_line(tmp_path, damage) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": 2.5})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    with Tracker(tmp_path, step=2) as tracker:
        tracker.log(3, {"loss": 1.5})
    assert [line["step"] for line in read_history(tmp_path / "metrics.jsonl")] == [1, 3]
