import copy
import itertools
import json

import numpy as np
import pytest

from m3bind.eval.evaluate import evaluate
from m3bind.eval.metrics import assemble, load_metrics, save_metrics, targets, validate
from m3bind.eval.retrieval import retrieve

NAMES = ["xray", "ct", "retina", "ecg", "pathology"]
PAIRS = [f"{a}->{b}" for a, b in itertools.permutations(NAMES, 2)]


def test_a_complete_run_has_every_key(metrics, tmp_path):
    validate(metrics)
    save_metrics(metrics, tmp_path / "metrics.json")
    loaded = load_metrics(tmp_path / "metrics.json")
    validate(loaded)
    assert loaded["modalities"] == NAMES
    assert loaded["simulated"] is True and loaded["seed"] == 3 and loaded["commit"] == "0123abc"
    assert set(loaded["retrieval"]["aligned"]["map"]) == {"mean", *PAIRS}
    assert {"python", "torch", "numpy"} <= set(loaded["versions"])
    assert set(loaded["few_shot"]["before"]["mean"]) == {"1", "4", "16"}


def test_the_figures_are_those_of_the_measures(metrics, test_sets):
    sets = test_sets["aligned"]
    own = retrieve(
        sets["ecg"].image, sets["ecg"].labels, sets["ct"].image, sets["ct"].labels, seed=3
    )
    retrieval = metrics["retrieval"]
    assert retrieval["aligned"]["map"]["ecg->ct"] == own.map
    assert retrieval["chance"]["map"]["ecg->ct"] == own.chance
    assert retrieval["aligned"]["normalised"]["ecg->ct"] == own.normalised
    values = [retrieval["before"]["map"][pair] for pair in PAIRS]
    assert retrieval["before"]["map"]["mean"] == pytest.approx(np.mean(values))
    # reports of the ECG patients against the CT images
    text = retrieve(
        sets["ecg"].text, sets["ecg"].labels, sets["ct"].image, sets["ct"].labels, seed=3
    )
    assert metrics["text_retrieval"]["aligned"]["ecg->ct"] == text.map
    # each report and its own image, among 7 labels x 8 patients
    own = metrics["own_image"]["aligned"]
    similarity = sets["ecg"].text @ sets["ecg"].image.T
    place = 1 + (similarity > similarity.diagonal()[:, None]).sum(axis=1)
    assert own["median_rank"]["ecg"] == np.median(place) and own["gallery"]["ecg"] == 56
    assert own["recall"]["5"]["ecg"] == pytest.approx((place <= 5).mean())
    # no diabetes in a CT: those ECG patients are no queries
    assert retrieval["aligned"]["queries"]["ecg->ct"] == 5 * 8


def test_binding_shows_and_targets_know(metrics):
    met = [t.met for t in targets(metrics)]
    assert all(met) and len(met) == 8
    assert abs(metrics["retrieval"]["before"]["normalised"]["mean"]) < 0.15
    assert metrics["modality_gap"]["aligned"]["mean"] < metrics["modality_gap"]["before"]["mean"]


@pytest.mark.parametrize(
    ("path", "value", "failing"),
    [
        ("retrieval.before.map.mean", 0.36, 0),
        ("retrieval.aligned.normalised.mean", 0.449, 1),
        ("retrieval.aligned.map.ct->ecg", 0.01, 2),
        ("zero_shot.before.name.mean", 0.79, 3),
        ("zero_shot.aligned.name.mean", 0.5, 4),
        ("zero_shot.distilled.name.mean", 0.5, 5),
        ("text_retrieval.aligned.mean", 1.0, 6),
        ("text_retrieval.control.mean", 0.9, 7),
    ],
)
def test_each_target_can_fail(metrics, path, value, failing):
    changed = copy.deepcopy(metrics)
    *parents, last = path.split(".")
    node = changed
    for key in parents:
        node = node[key]
    node[last] = value
    if failing == 6:
        changed["text_retrieval"]["distilled"]["mean"] = 0.899
    met = [t.met for t in targets(changed)]
    assert not met[failing]
    assert sum(met) == 7


def test_what_was_not_measured_is_not_met():
    assert [t.met for t in targets({})] == [False] * 8


def test_validate_lists_everything_that_is_wrong(metrics):
    changed = copy.deepcopy(metrics)
    del changed["zero_shot"]["distilled"]["findings"]["ecg"]
    changed["retrieval"]["before"]["map"]["ct->ecg"] = 1.2
    changed["own_image"]["aligned"]["median_rank"]["ct"] = 0
    changed["seed"] = "3"
    with pytest.raises(ValueError) as error:
        validate(changed)
    text = str(error.value)
    assert "zero_shot.distilled.findings.ecg: missing" in text
    assert "retrieval.before.map.ct->ecg: 1.2" in text
    assert "own_image.aligned.median_rank.ct: 0 is not within" in text
    assert "seed: expected int" in text


def test_nan_is_never_written(metrics, tmp_path):
    changed = {**metrics, "seconds": {"align": float("nan")}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_metrics(changed, tmp_path / "metrics.json")
    assert not (tmp_path / "metrics.json").exists()


def test_unlabelled_real_files_leave_gaps_not_zeros(test_sets, train_sets):
    few = copy.deepcopy({"before": test_sets["before"]})
    for item in few["before"].values():
        item.labels = [""] * len(item)
    out = evaluate(few, {"before": train_sets["before"]})
    assert out["zero_shot"] == out["retrieval"] == out["text_retrieval"] == out["few_shot"] == {}
    assert out["modality_gap"]["before"]["mean"] > 0
    run = assemble(out, seconds={}, peak_rss_mib={}, simulated=False, seed=0)
    assert sorted(run["modalities"]) == sorted(NAMES)
    json.dumps(run, allow_nan=False)
    with pytest.raises(ValueError, match="unknown stage 'after'"):
        evaluate({"after": test_sets["before"]})


def test_evaluation_is_reproducible(metrics, test_sets, train_sets):
    again = evaluate(test_sets, train_sets, seed=3, num_shot_seeds=3)
    for section, values in again.items():
        assert values == metrics[section]
