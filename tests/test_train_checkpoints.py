"""Which checkpoint a training goes on from, refuses or sets aside, wherever it was cut."""

import json
import math
import os
import re
import shutil

import pytest
from train_stub import Stub, StubLoader, config, kept, quadratic

from m3bind.errors import M3BindError
from m3bind.tracking import read_history
from m3bind.train import checkpoints, fit, load_best
from m3bind.train.index import read_checkpoint


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

    settings = config(checkpoint_every=values.pop("more", 1000), **values)
    result = fit(task, {"stub": StubLoader()}, settings, out, validate=validate, resume=resume)
    return task.weight.item(), seen, result


def test_what_goes_on_from_an_earlier_step_knows_the_same_best(tmp_path) -> None:
    _, seen, _ = run(tmp_path / "whole", [0.2, 0.9, 0.5, 0.4])
    with pytest.raises(Cut):
        run(tmp_path / "cut", [0.2, 0.9], cut_at(8))
    # Scores may come out otherwise after it: on other ranks, or on a GPU.
    weight, later, result = run(tmp_path / "cut", [0.3, 0.1], resume=True)
    assert (result.best_step, result.best_score) == (6, 0.9)
    assert weight == seen[1] and len(later) == 2  # of steps 9 and 10
    assert kept(tmp_path / "cut", "best")["model/weight"].item() == seen[1]
    assert read_checkpoint(tmp_path / "cut")["best"]["folder"].startswith("step-6-")


@pytest.mark.parametrize("cut_in", ["save_parts", "write_json"])
def test_a_cut_while_it_is_written_leaves_the_one_before(tmp_path, monkeypatch, cut_in):
    _, seen, _ = run(tmp_path / "whole", [0.2, 0.9, 0.5, 0.4])
    write, folder = getattr(checkpoints, cut_in), tmp_path / "cut" / "checkpoints"

    def cut(path, content):
        if cut_in == "save_parts":
            write(path, content)
        if list(folder.glob("step-6-*")):
            raise Cut
        return write(path, content)

    monkeypatch.setattr(checkpoints, cut_in, cut)
    with pytest.raises(Cut):
        run(tmp_path / "cut", [0.2, 0.9])
    monkeypatch.setattr(checkpoints, cut_in, write)
    found = read_checkpoint(tmp_path / "cut")
    assert found["step"] == found["best_step"] == 3
    (left,) = folder.glob("step-6-*")
    weight, later, result = run(tmp_path / "cut", [0.9, 0.5, 0.4], resume=True)
    assert (result.best_step, weight) == (6, seen[1]) and later == seen[1:]
    assert not left.exists()


def test_what_is_half_written_takes_no_room(tmp_path, monkeypatch):
    """Neither after a save that failed nor after a resume of a run that was killed in one."""
    write, folder = checkpoints.save_parts, tmp_path / "checkpoints"

    def full(path, tensors):
        if path.name.startswith("step-4"):
            path.mkdir(parents=True)
            (path / "half").touch()
            raise M3BindError("no space left")
        return write(path, tensors)

    monkeypatch.setattr(checkpoints, "save_parts", full)
    with pytest.raises(M3BindError, match="no space left"):
        run(tmp_path, [0.1] * 9, more=2)
    (left,) = folder.glob("step-*")
    assert left.name.startswith("step-3-")
    (folder / "step-4-killed").mkdir()
    seen = []
    monkeypatch.setattr(
        checkpoints, "save_parts",
        lambda path, tensors: seen.append(list(folder.glob("*killed"))) or write(path, tensors),
    )  # fmt: skip
    run(tmp_path, [0.1] * 9, more=2, resume=True)
    assert seen[0] == []


def test_only_the_last_and_the_best_are_kept(tmp_path):
    run(tmp_path, [0.2, 0.9, 0.5, 0.4])
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert [name.rpartition("-")[0] for name in names] == ["", "step-10", "step-6"]
    assert read_checkpoint(tmp_path)["last"]["folder"] == names[1]


def test_no_more_is_written_where_no_score_was_a_number(tmp_path, monkeypatch):
    written = []
    save = checkpoints.save_parts
    monkeypatch.setattr(
        checkpoints, "save_parts", lambda *given: written.append(given[0].name) or save(*given)
    )
    fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path)
    assert [name.rpartition("-")[0] for name in written] == ["step-4", "step-8", "step-10"]
    assert read_checkpoint(tmp_path)["best"]["folder"] == written[-1]


def test_the_best_weights_of_a_run_that_has_none_yet(tmp_path):
    with pytest.raises(Cut):
        run(tmp_path, [math.nan], cut_at(7), validate_every=5, more=4)
    with pytest.raises(M3BindError, match="names no best weights yet"):
        load_best(Stub(quadratic), tmp_path)


def test_what_is_not_of_this_version_is_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.safetensors").write_text("of an earlier version")
    fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path, resume=True)
    assert (tmp_path / "checkpoints.previous" / "last.safetensors").is_file()


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path)
    other = Stub(quadratic)
    other.renamed = other.weight
    del other._parameters["weight"]
    object.__setattr__(other, "weight", other.renamed)
    with pytest.raises(M3BindError, match=r"fit the optimizer: .*unexpected \['weight'\]"):
        fit(other, {"stub": StubLoader()}, config(), tmp_path, resume=True)


def test_settings_that_json_writes_otherwise_are_the_same_settings(tmp_path):
    for resume in (False, True):
        more = {"settings": {"sizes": (1, 2)}, "resume": resume}
        fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path, **more)


def test_a_run_that_wrote_no_checkpoint_does_not_cost_an_earlier_one_its_own(tmp_path) -> None:
    run(tmp_path, [0.2, 0.9, 0.5, 0.4])
    for _ in range(3):
        with pytest.raises(Cut):
            run(tmp_path, [], cut_at(2))
        (tmp_path / "checkpoints" / "step-6").mkdir(parents=True)  # not yet whole
    take_up_previous(tmp_path)
    assert read_checkpoint(tmp_path)["step"] == 10 and kept(tmp_path) and kept(tmp_path, "best")


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
    assert read_checkpoint(tmp_path)["step"] == 4
    take_up_previous(tmp_path)
    assert read_checkpoint(tmp_path)["step"] == 10
    assert [line["step"] for line in read_history(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def take_up_previous(out) -> None:
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints.previous").rename(out / "checkpoints")


def test_a_checkpoint_of_another_model_is_refused(tmp_path) -> None:
    fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path)
    other = Stub(quadratic)
    other.load_trainable_state = lambda state: (_ for _ in ()).throw(ValueError("no such key"))
    with pytest.raises(M3BindError, match="does not fit the model: no such key"):
        fit(other, {"stub": StubLoader()}, config(), tmp_path, resume=True)
    other.trainable_state = lambda: {"weight": other.weight, "bias": other.weight}
    with pytest.raises(M3BindError, match=r"step-10\S* does not fit the model: missing \['bias'\]"):
        fit(other, {"stub": StubLoader()}, config(), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", "is damaged"),
        ("[]", "not of a checkpoint of this version"),
        ('{"format": "m3bind-checkpoint-4", "last": {}}', "is damaged: it lacks best, best_score"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, written, said) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "index.json").write_text(written)
    with pytest.raises(M3BindError, match=rf"index\.json .*{said}"):
        fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path, resume=True)


@pytest.mark.parametrize("changed", [
    {"step": "10"}, {"step": None}, {"step": 10.0}, {"step": True}, {"step": -3}, {"step": 10**30},
    {"best_step": 2.5}, {"seconds": True}, {"best_score": []}, {"config": []}, {"layout": {}},
    {"layout": [1]}, {"layout": [["stub"], [3]]}, {"last": {}}, {"best": {}}, {"best": None},
    {"last": "step-10"}, {"last": {"folder": "x"}},
    {"last": {"folder": 1, "tensors": 2, "numbers": 3}},
    {"best": {"folder": "x", "tensors": 2, "numbers": 3, "more": 4}},
])  # fmt: skip
def test_an_index_whose_values_are_of_other_types_is_named(tmp_path, changed) -> None:
    fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path)
    index = tmp_path / "checkpoints" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changed))
    ((name, value),) = changed.items()
    with pytest.raises(M3BindError, match=re.escape(f"{index} is damaged: {name} is {value!r}")):
        fit(Stub(quadratic), {"stub": StubLoader()}, config(), tmp_path, resume=True)


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
    # From before torchrun, here this process's parent, was started.
    os.utime(tmp_path / "checkpoints" / "index.json", (1, 1))
    assert steps_taken(by_torchrun=True) == 4
    assert steps_taken(by_torchrun=False) == 4  # started by hand
    history = read_history(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in history] == [1, 2, 3, 4]
