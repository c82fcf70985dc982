"""The simulated cohort as a data set: its table, its patients, its files and its reports."""

import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest

from m3bind.data.audit import audit
from m3bind.data.dataset import Dataset
from m3bind.data.phantom import cohort as cohort_module
from m3bind.data.phantom import make_cohort, make_patient, make_record, simulate, table
from m3bind.data.phantom.patients import patient_number
from m3bind.data.phantom.reports import write_report
from m3bind.data.reports import sections
from m3bind.data.shards import iter_records, shard_paths
from m3bind.errors import M3BindError

MODALITIES = ("xray", "ct", "retina", "ecg", "pathology")
SIZES = {"train": 1512, "val": 210, "test": 420}


def names(text: str, label: str) -> bool:
    return any(word in text.lower() for word in table().names[label])


def names_any_condition(text: str) -> bool:
    return any(names(text, label) for label in table().labels if label != "none")


def test_table_holds_seven_conditions_and_every_pair_shares_four():
    assert len(table().labels) == 8 and table().labels[0] == "none"
    assert tuple(table().modalities) == MODALITIES
    for first, second in itertools.combinations(MODALITIES, 2):
        assert len(table().shared(first, second)) >= 4, (first, second)


@pytest.mark.parametrize("modality", MODALITIES)
def test_prompts_name_or_describe(modality):
    spec = table().modalities[modality]
    assert set(spec.signs) == set(spec.labels)
    for label in spec.labels:
        by_name, by_findings = (spec.prompts[style][label] for style in ("name", "findings"))
        assert len(set(by_name)) >= 3 and len(set(by_findings)) >= 3
        assert all(names(prompt, label) for prompt in by_name)
        assert not any(names(prompt, label) for prompt in by_findings)
        assert not any(names_any_condition(prompt) for prompt in by_findings)


def test_no_patient_is_in_two_modalities_or_splits():
    """All patients of a cohort of the usual size: one examination each."""
    seen = dict[str, tuple]()
    for modality, (split, count) in itertools.product(MODALITIES, SIZES.items()):
        for i in range(count):
            patient = make_patient(modality, split, i, 0)
            where = (modality, split, i)
            assert seen.setdefault(patient.pseudonym, where) == where
            assert (patient.modality, patient.split) == (modality, split)
    assert len(seen) == len(MODALITIES) * sum(SIZES.values())


def test_another_seed_has_other_patients():
    first, second = (make_patient("ecg", "train", 5, seed) for seed in (0, 1))
    assert first.pseudonym != second.pseudonym


def test_labels_are_balanced():
    for modality in MODALITIES:
        labels = [make_patient(modality, "test", i, 0).label for i in range(420)]
        counts = {label: labels.count(label) for label in set(labels)}
        assert set(counts) == set(table().modalities[modality].labels)
        assert max(counts.values()) - min(counts.values()) == 0
        assert labels[:50] != sorted(labels[:50])


def test_patients_beyond_the_block_are_refused():
    with pytest.raises(ValueError, match="ask for fewer"):
        patient_number("ecg", "train", 1 << 20)


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_record_depends_on_nothing_but_its_number(modality):
    before = make_record(modality, "test", 3, 7)
    make_record(modality, "test", 4, 7)
    again = make_record(modality, "test", 3, 7)
    other = make_record(modality, "test", 3, 8)
    assert before == again
    assert before.payload != other.payload


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    make_cohort(root, seed=4, train=14, val=7, test=7, workers=1)
    return root


def test_every_shard_says_that_it_is_simulated(cohort):
    dataset = Dataset.load(cohort)
    assert dataset.simulated and "simulat" in dataset.extra["note"]
    assert dataset.extra["seed"] == 4
    counts = audit(cohort)
    assert len(counts) == 15 and set(counts.values()) == {14, 7}
    for modality in MODALITIES:
        assert dataset.modalities[modality].prompts == table().modalities[modality].prompts
        for split in SIZES:
            paths = shard_paths(cohort, modality, split)
            assert paths and all(path.name.startswith("simulated-") for path in paths)
            for record in iter_records(cohort, modality, split):
                assert record.simulated and record.id.startswith("simulated-")
                assert record.meta()["attributes"]["severity"] in ("mild", "moderate", "severe")


def test_shapes_and_kinds(cohort):
    want = {
        "xray": ((160, 160), np.uint8),
        "retina": ((160, 160, 3), np.uint8),
        "pathology": ((160, 160, 3), np.uint8),
        "ct": ((32, 80, 80), np.int16),
        "ecg": ((12, 5000), np.int16),
    }
    for modality, (shape, dtype) in want.items():
        record = next(iter_records(cohort, modality, "val"))
        array = record.array()
        assert (array.shape, array.dtype) == (shape, dtype)
        if modality == "ct":
            assert 8 < record.spacing_mm[0] < 11 and 3 < record.spacing_mm[1] < 6
        if modality == "ecg":
            assert record.rate_hz == 500


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    roots = [tmp_path / name for name in ("one", "two")]
    for workers, root in enumerate(roots, 1):
        make_cohort(root, train=12, val=2, test=4, workers=workers, modalities=["ecg", "retina"])
    files = [sorted(p.relative_to(r) for p in r.rglob("*") if p.is_file()) for r in roots]
    assert files[0] == files[1] and len(files[0]) == 19
    for name in files[0]:
        assert (roots[0] / name).read_bytes() == (roots[1] / name).read_bytes(), name


def test_a_finished_cohort_is_left_alone_and_another_replaces_it(tmp_path):
    sizes = {"train": 7, "val": 1, "test": 1, "workers": 1, "modalities": ["ecg"]}
    make_cohort(tmp_path, **sizes)
    shard = shard_paths(tmp_path, "ecg", "train")[0]
    stamp, content = shard.stat().st_mtime_ns, shard.read_bytes()
    make_cohort(tmp_path, **sizes)
    assert shard.stat().st_mtime_ns == stamp
    make_cohort(tmp_path, **sizes, seed=1)
    assert shard.read_bytes() != content
    assert Dataset.load(tmp_path).extra["seed"] == 1
    content = shard.read_bytes()
    shard.unlink()  # somebody tidied up, or followed the advice for a damaged shard
    make_cohort(tmp_path, **sizes, seed=1)
    assert shard.read_bytes() == content


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
@pytest.mark.parametrize("size", [0, 5000])
def test_a_shard_that_was_cut_is_made_again(tmp_path, suffix, size):
    sizes = {"train": 60, "val": 1, "test": 1, "workers": 1, "modalities": ["ecg"]}
    make_cohort(tmp_path, **sizes)
    file = shard_paths(tmp_path, "ecg", "train")[0].with_suffix(suffix)
    content = file.read_bytes()
    file.write_bytes(content[:size])
    make_cohort(tmp_path, **sizes)
    assert file.read_bytes() == content and len(content) > size


def test_the_fingerprint_covers_every_module_that_shapes_the_bytes():
    """Those of m3bind.data that the simulators, and in turn those themselves, import."""
    package = Path(cohort_module.__file__).parent
    wanted, todo = set(), [*package.glob("*.py")]
    while todo:
        names = re.findall(
            r"^from m3bind\.data\.(\w+) import", todo.pop().read_text(), re.MULTILINE
        )
        todo += [package.parent / f"{name}.py" for name in set(names) - wanted]
        wanted |= set(names)
    assert set(cohort_module._SHAPES_BYTES) == wanted


class Deadly:
    """Ends the process that unpickles it, as the kernel does where memory runs out."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_process_that_is_killed_is_one_error():
    jobs = [("ecg", "train", i, 0) for i in range(40)]
    jobs[20] = ("ecg", "train", Deadly(), 0)
    with pytest.raises(M3BindError, match=r"one of 2 processes .* was killed.*--workers"):
        list(cohort_module._records(jobs, 2))


@pytest.fixture(scope="module")
def written():
    """(patient, facts, findings, impression) of several hundred patients."""
    found = []
    for modality in MODALITIES:
        for i in range(180 if modality == "ecg" else 42):
            patient = make_patient(modality, "val", i, 11)
            simulated = simulate(patient)
            found.append((patient, simulated.facts, *write_report(patient, simulated)))
    return found


def test_impressions_name_the_condition_in_half_of_the_cases(written):
    named = [names(impression, p.label) for p, _, _, impression in written]
    assert 0.42 < np.mean(named) < 0.58
    for p, _, _, impression in written:
        others = [x for x in table().labels if x not in (p.label, "none")]
        assert not any(names(impression, other) for other in others), impression


def test_findings_never_name_the_condition(written):
    for p, _, findings, _ in written:
        assert not names_any_condition(findings) and not names(findings, p.label), findings


def test_reports_are_short_sentences_without_gaps(written):
    for _, _, findings, impression in written:
        for text in (findings, impression):
            assert re.fullmatch(r"[A-Z0-9][^{}]*[.]", text), text
            assert "  " not in text
        assert 8 <= len(findings.split()) <= 45, findings
        assert 3 <= len(impression.split()) <= 14, impression


def test_reports_differ_within_a_label(written):
    reports = [findings + impression for _, _, findings, impression in written]
    assert len(set(reports)) > 0.93 * len(reports)


def test_reports_tell_the_patients_attributes(written):
    def told(modality: str, label: str, *words: str) -> bool:
        """Whether every report of the label holds one of the facts or attributes."""
        chosen = [x for x in written if x[0].modality == modality and x[0].label == label]
        assert chosen
        for patient, facts, findings, impression in chosen:
            known = patient.attributes() | facts
            text = f"{findings} {impression}".lower()
            if not any(str(known[word]).lower() in text for word in words):
                return False
        return True

    assert told("ecg", "atrial_fibrillation", "rate")
    assert told("xray", "lung_tumour", "side") and told("xray", "lung_tumour", "size_mm")
    assert told("ct", "emphysema", "laa_percent", "severity")
    assert told("ct", "hypertension", "wall_mm") and told(
        "ct", "hypertension", "aorta_mm", "wall_mm"
    )
    assert told("retina", "hypertension", "flames", "wool")
    assert told("pathology", "lung_tumour", "glands")
    eyes = [(p, f) for p, _, f, _ in written if p.modality == "retina"]
    assert all(p.side in findings.lower() for p, findings in eyes)


def test_sections_of_a_record_are_findings_and_impression():
    record = make_record("ecg", "train", 0, 0)
    parts = sections(record.report)
    assert parts.findings and parts.impression
