"""Zero-shot classification with ensembles of prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3bind.eval.store import as_unit

__all__ = ["ZeroShot", "class_vectors", "zero_shot"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroShot:
    """``recall`` is by true class; ``confusion`` counts [true, predicted] in ``classes`` order."""

    balanced_accuracy: float
    low: float
    high: float
    classes: tuple[str, ...]
    recall: dict[str, float]
    confusion: np.ndarray
    num_samples: int


def class_vectors(
    prompts: Mapping[str, Any],  # label -> [num_prompts, D]
) -> tuple[tuple[str, ...], np.ndarray]:
    """One unit vector for each class: the mean of its prompts' unit vectors, renormalised.

    Equivalent: ``F.normalize(torch.stack([p.mean(0) for p in prompts.values()]), dim=-1)``.
    Source: CONCH and FLAIR ensemble prompts in this way.
    """
    means = np.stack(
        [as_unit(rows, f"prompts of {label}").mean(axis=0) for label, rows in prompts.items()]
    )
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    if (norms < 1e-6).any():
        label = list(prompts)[int(norms[:, 0].argmin())]
        raise ValueError(f"the prompts of {label!r} cancel out: their mean has no direction")
    return tuple(prompts), means / norms


def zero_shot(
    image: Any,  # [N, D] unit norm
    labels: Sequence[str],
    prompts: Mapping[str, Any],  # label -> [num_prompts, D] unit norm
    *,
    num_bootstrap: int = 1000,
    seed: int = 0,
    where: str = "the modality's prompts",
) -> ZeroShot:
    """``prediction = (image @ class_vectors.T).argmax(1)``, scored by balanced accuracy.

    Rows with the label "" (unknown) are left out. Balanced accuracy is the mean of the recalls
    over the classes that occur among the true labels, as in scikit-learn. ``low`` and ``high``
    are the 95 % percentile bootstrap interval over patients, resampled within their class.

    Raises ``ValueError`` where nothing is labelled or a true label has no prompt, which ``where``
    then names.
    """
    image = as_unit(image, "image embeddings")
    classes, vectors = class_vectors(prompts)
    known = np.array([label != "" for label in labels], dtype=bool)
    if not known.any():
        raise ValueError("zero-shot needs labelled images, and no image has a label")
    missing = sorted({label for label in labels if label} - set(classes))
    if missing:
        raise ValueError(f"no prompt for {missing} in {where}: add it there, or correct the labels")
    index = {label: i for i, label in enumerate(classes)}
    true = np.array([index[label] for label in labels if label])
    predicted = (image[known] @ vectors.T).argmax(axis=1)

    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (true, predicted), 1)
    count = confusion.sum(axis=1)
    present = count > 0
    recall = np.diag(confusion)[present] / count[present]
    # resampling n patients of a class with replacement gives a binomial number of right ones:
    # the bootstrap needs no loop over samples
    rng = np.random.default_rng(seed)
    draws = rng.binomial(count[present], recall, size=(num_bootstrap, present.sum()))
    low, high = np.quantile((draws / count[present]).mean(axis=1), [0.025, 0.975])
    return ZeroShot(
        balanced_accuracy=float(recall.mean()),
        low=float(low),
        high=float(high),
        classes=classes,
        recall={classes[i]: float(r) for i, r in zip(np.flatnonzero(present), recall, strict=True)},
        confusion=confusion,
        num_samples=len(true),
    )
