"""Few-shot linear probe: logistic regression on k labelled embeddings of each class."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3bind.eval.store import as_unit

__all__ = ["FewShot", "few_shot", "pick_shots"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShot:
    """Balanced accuracy on the test split over the seeds; ``std`` is the sample deviation."""

    mean: float
    std: float
    values: tuple[float, ...]


def pick_shots(labels: Sequence[str], num_shots: int, seed: int) -> np.ndarray:
    """Row numbers of ``num_shots`` random samples of every labelled class, sorted.

    Drawn in the order of the sorted class names, so that the choice depends on the seed and the
    labels alone. Raises ``ValueError`` where a class has fewer samples.
    """
    array = np.asarray(labels)
    rng = np.random.default_rng(seed)
    chosen = []
    for label in sorted(set(labels) - {""}):
        rows = np.flatnonzero(array == label)
        if len(rows) < num_shots:
            raise ValueError(f"{num_shots} shots asked for, but {label!r} has {len(rows)} samples")
        chosen.append(rng.permutation(rows)[:num_shots])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def few_shot(
    train_image: Any,  # [N, D]
    train_labels: Sequence[str],
    test_image: Any,  # [M, D]
    test_labels: Sequence[str],
    *,
    num_shots: int,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    c: float = 0.316,
) -> FewShot:
    """``LogisticRegression(C=c).fit(k per class).predict(test)``, once for each seed.

    The seed decides which samples are the shots; the solver (lbfgs) is deterministic. ``c`` is
    the inverse L2 strength of FLAIR's and CLIP's linear probe. Unlabelled rows are left out.
    Raises ``ValueError`` with fewer than two classes, or a class with fewer samples than shots.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    train_image = as_unit(train_image, "training embeddings")
    test_image = as_unit(test_image, "test embeddings")
    classes = sorted(set(train_labels) - {""})
    if len(classes) < 2:
        raise ValueError(f"a linear probe needs two classes or more, got {classes}")
    known = [i for i, label in enumerate(test_labels) if label]
    if not known:
        raise ValueError("a linear probe needs labelled test images, and none has a label")
    truth = np.asarray(test_labels)[known]
    labels = np.asarray(train_labels)
    values = []
    for seed in seeds:
        rows = pick_shots(train_labels, num_shots, seed)
        probe = LogisticRegression(C=c, max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            probe.fit(train_image[rows].astype(np.float64), labels[rows])
        predicted = probe.predict(test_image[known].astype(np.float64))
        with warnings.catch_warnings():
            # a class of the training split that the test split lacks may be predicted: it counts
            # as an error, and scikit-learn's warning about it says nothing more
            warnings.filterwarnings("ignore", message="y_pred contains classes")
            values.append(float(balanced_accuracy_score(truth, predicted)))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return FewShot(mean=float(np.mean(values)), std=spread, values=tuple(values))
