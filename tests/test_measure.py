"""Seconds and memory of a stage that is stopped and resumed are those of all its parts."""

import json
import time

import pytest

from m3bind import measure
from m3bind.errors import Interrupted, M3BindError
from m3bind.measure import measured, read_stages


def part(folder, *, seconds: float = 0.1, resume: bool = False, error=None) -> None:
    with measured(folder, "align", resume=resume):
        time.sleep(seconds)
        if error is not None:
            raise error


def test_a_resumed_stage_counts_with_all_its_parts(tmp_path):
    with pytest.raises(Interrupted):
        part(tmp_path, seconds=0.4, error=Interrupted("stopped"))
    assert read_stages(tmp_path) == {}  # it has not ended
    part(tmp_path, resume=True)
    whole = read_stages(tmp_path)["align"]
    assert 0.5 <= whole["seconds"] < 5 and whole["peak_rss_mib"] > 10
    part(tmp_path)
    assert read_stages(tmp_path)["align"]["seconds"] < whole["seconds"]  # begun anew


def test_the_highest_peak_of_all_parts_counts(tmp_path, monkeypatch):
    peaks = iter([900.0, 40.0])
    monkeypatch.setattr(measure.PeakMemory, "stop", lambda self: self._ended.set() or next(peaks))
    with pytest.raises(Interrupted):
        part(tmp_path, error=Interrupted("stopped"))
    part(tmp_path, resume=True)
    assert read_stages(tmp_path)["align"]["peak_rss_mib"] == 900.0


def test_a_kill_does_not_lose_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "WRITE_SECONDS", 0.0)
    with measured(tmp_path, "align"):
        end, said = time.monotonic() + 60, 0.0
        while said < 0.2 and time.monotonic() < end:  # a busy machine lets it wait
            time.sleep(0.1)
            killed = (tmp_path / "stages.json").read_text()  # as a kill here would leave it
            said = json.loads(killed)["align"]["seconds"]
    (tmp_path / "stages.json").write_text(killed)
    assert read_stages(tmp_path) == {}
    monkeypatch.setattr(measure, "WRITE_SECONDS", 60.0)
    part(tmp_path, seconds=0.0, resume=True)
    assert read_stages(tmp_path)["align"]["seconds"] >= 0.2


def test_a_mistake_that_is_found_at_once_changes_nothing(tmp_path):
    part(tmp_path, seconds=0.2)
    before = read_stages(tmp_path)
    with pytest.raises(M3BindError):
        part(tmp_path, error=M3BindError("no such file"))
    assert read_stages(tmp_path) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"align": {}}', '{"align": {"seconds": "x"}}'])
def test_damaged_times_are_named_before_any_work(tmp_path, content):
    (tmp_path / "stages.json").write_text(content)
    with pytest.raises(M3BindError, match=r"stages\.json is damaged .*: remove it"):
        part(tmp_path, error=AssertionError("the work began"))


def test_a_folder_that_cannot_be_made_is_found_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/run"):
        part(tmp_path / "file" / "run", error=AssertionError("the work began"))
