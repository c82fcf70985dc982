"""Checkpoints of a training that is cut where it hurts most."""

import shutil

import pytest
from train_stub import Stub, StubLoader, config, quadratic

from m3bind.checkpoint import load_checkpoint
from m3bind.train import checkpoints, fit


class Cut(Exception):
    pass


def cut_at(number: int):
    def function(weight, given):
        if given == number:
            raise Cut
        return quadratic(weight, given)

    return function


def run(out, scores, function=quadratic, *, resume=False, **values):
    """The weights that it leaves, by step those that were validated, and the result."""
    task, seen, left = Stub(function), [], iter(scores)

    def validate() -> dict[str, float]:
        seen.append(task.weight.item())
        return {"score": next(left)}

    settings = config(checkpoint_every=1000, **values)
    result = fit(task, {"stub": StubLoader()}, settings, out, validate=validate, resume=resume)
    return task.weight.item(), seen, result


def weight_in(path) -> tuple[float, int]:
    sections, data = load_checkpoint(path)
    return sections["model"]["weight"].item(), data["step"]


def test_what_goes_on_from_an_earlier_step_knows_the_same_best(tmp_path) -> None:
    _, seen, _ = run(tmp_path / "whole", [0.2, 0.9, 0.5, 0.4])
    with pytest.raises(Cut):
        run(tmp_path / "cut", [0.2, 0.9], cut_at(8))
    # Scores may come out otherwise after it: on other ranks, or on a GPU.
    weight, later, result = run(tmp_path / "cut", [0.3, 0.1], resume=True)
    assert (result.best_step, result.best_score) == (6, 0.9)
    assert weight == seen[1] and len(later) == 2  # of steps 9 and 10
    assert weight_in(tmp_path / "cut/checkpoints/best.safetensors") == (seen[1], 6)


def test_a_cut_between_the_last_and_the_best_checkpoint_loses_neither(tmp_path, monkeypatch):
    _, seen, _ = run(tmp_path / "whole", [0.2, 0.9, 0.5, 0.4])
    write = checkpoints.save_checkpoint

    def cut(path, sections, data):
        if path.stem == "best" and data["step"] == 6:
            raise Cut
        write(path, sections, data)

    monkeypatch.setattr(checkpoints, "save_checkpoint", cut)
    with pytest.raises(Cut):
        run(tmp_path / "cut", [0.2, 0.9])
    monkeypatch.setattr(checkpoints, "save_checkpoint", write)
    folder = tmp_path / "cut" / "checkpoints"
    assert weight_in(folder / "best.safetensors")[1] == 3
    weight, _, result = run(tmp_path / "cut", [0.5, 0.4], resume=True)
    assert (result.best_step, weight) == (6, seen[1])
    assert weight_in(folder / "best.safetensors") == (seen[1], 6)


def test_a_run_that_wrote_no_checkpoint_does_not_cost_an_earlier_one_its_own(tmp_path) -> None:
    run(tmp_path, [0.2, 0.9, 0.5, 0.4])
    for _ in range(3):
        with pytest.raises(Cut):
            run(tmp_path, [], cut_at(2))
        (tmp_path / "checkpoints").mkdir()
        shutil.copy(
            tmp_path / "checkpoints.previous" / "best.safetensors",
            tmp_path / "checkpoints" / "best.safetensors",
        )
    assert weight_in(tmp_path / "checkpoints.previous" / "last.safetensors")[1] == 10
