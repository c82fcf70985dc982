"""The simulated cohort: what is refused, and what is left alone."""

import pytest

from m3bind.data.dataset import Dataset
from m3bind.data.phantom import make_cohort
from m3bind.errors import M3BindError


def test_a_cohort_that_was_interrupted_is_no_data_set(tmp_path, monkeypatch):
    sizes = {"train": 3, "val": 1, "test": 1, "workers": 1, "modalities": ["ecg"]}
    make_cohort(tmp_path, **sizes)

    def stop(patient):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("m3bind.data.phantom.cohort.simulate", stop)
        with pytest.raises(KeyboardInterrupt):
            make_cohort(tmp_path, **sizes, seed=1)
    with pytest.raises(M3BindError, match=r"no dataset\.yaml"):
        Dataset.load(tmp_path)
    assert make_cohort(tmp_path, **sizes, seed=1).extra["seed"] == 1


def test_somebodys_files_are_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(M3BindError, match=r"thesis\.txt"):
        make_cohort(tmp_path, train=1, val=1, test=1, workers=1)
    (tmp_path / "thesis.txt").unlink()
    (tmp_path / "ecg" / "train").mkdir(parents=True)
    real = tmp_path / "ecg" / "train" / "hospital-ecg-train-000000.tar"
    real.write_bytes(b"")
    with pytest.raises(M3BindError, match="hospital"):
        make_cohort(tmp_path, train=1, val=1, test=1, workers=1)
    assert real.is_file()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": 0}, "train=0"),
        ({"modalities": ["mri"]}, "mri"),
        ({"workers": 0}, "workers 0 must be at least 1"),
        ({"seed": -1}, "seed -1 must be from 0"),
    ],
)
def test_wrong_sizes_and_modalities(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_cohort(tmp_path, **wrong)
