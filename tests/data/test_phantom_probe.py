"""Signs carry the label, not brightness: a linear probe on thumbnails must do badly."""

import multiprocessing

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

from m3bind.data.phantom import make_patient, simulate

LIMIT = 0.6


def thumbnail(array: np.ndarray) -> np.ndarray:
    """16x16 of an image; of a CT, its mean over depth; of an ECG, mean and variance a lead."""
    if array.ndim == 2 and array.shape[0] == 12:
        millivolt = array / 1000
        return np.concatenate([millivolt.mean(1), millivolt.var(1)])
    if array.ndim == 3 and array.shape[2] != 3:
        array = np.clip(array, -1000, 1000).mean(0).astype(np.float32)
    return np.asarray(Image.fromarray(array).resize((16, 16), Image.Resampling.BOX)).ravel()


def features(job):
    patient = make_patient(*job)
    return thumbnail(simulate(patient).array), patient.label


def probe(modality: str, train: int, test: int, run=map) -> float:
    """Balanced accuracy on test patients, the better of two strengths of regularisation."""
    found = {}
    for split, count in (("train", train), ("test", test)):
        rows = list(run(features, [(modality, split, i, 0) for i in range(count)]))
        found[split] = (np.array([x for x, _ in rows], float), [y for _, y in rows])
    scale = StandardScaler().fit(found["train"][0])
    train_x, test_x = (scale.transform(found[split][0]) for split in ("train", "test"))
    scores = []
    for strength in (0.01, 1.0):
        model = LogisticRegression(C=strength, max_iter=300).fit(train_x, found["train"][1])
        scores.append(balanced_accuracy_score(found["test"][1], model.predict(test_x)))
    return max(scores)


@pytest.mark.parametrize(("modality", "train", "test"), [("ecg", 700, 210), ("xray", 210, 105)])
def test_thumbnails_do_not_give_the_label_away(modality, train, test):
    assert probe(modality, train, test) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["xray", "ct", "retina", "ecg", "pathology"])
def test_thumbnails_of_the_whole_cohort_do_not_give_the_label_away(modality):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert probe(modality, 1512, 420, lambda f, jobs: pool.imap(f, jobs, chunksize=16)) < LIMIT


def test_the_probe_can_find_a_shortcut():
    """The probe is able to: a brightness that follows the label is found at once."""

    def shortcut(f, jobs):
        for x, label in map(f, jobs):
            yield x + 1.0 * (label == "diabetes") + 2.0 * (label == "none"), label

    assert probe("ecg", 210, 105, shortcut) > LIMIT
