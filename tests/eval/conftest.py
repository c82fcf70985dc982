"""A made-up run: five modalities, eight labels, embeddings that are bound only after stage 1."""

import numpy as np
import pytest

from m3bind.eval.store import EmbeddingSet

LABELS = (
    "none",
    "heart_failure",
    "hypertension",
    "diabetes",
    "atrial_fibrillation",
    "emphysema",
    "lung_tumour",
    "pulmonary_hypertension",
)
# what each modality cannot show
HIDDEN = {
    "xray": {"diabetes"},
    "ct": {"diabetes"},
    "retina": {"emphysema"},
    "ecg": {"lung_tumour"},
    "pathology": {"atrial_fibrillation"},
}
WIDTH = 32


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def make_stage(stage: str, split: str, per_label: int = 8) -> dict[str, EmbeddingSet]:
    """Clusters around one direction a label; before binding every modality has its own."""
    bound = stage in ("aligned", "distilled")
    sets = {}
    for number, (modality, hidden) in enumerate(HIDDEN.items()):
        axes = np.random.default_rng(0 if bound else 100 + number)
        direction = {label: axes.standard_normal(WIDTH) for label in LABELS}
        rng = np.random.default_rng([number, split == "train"])
        labels = [label for label in LABELS if label not in hidden] * per_label
        base = np.stack([direction[label] for label in labels])

        def around(scale: float, base=base, rng=rng) -> np.ndarray:
            return unit(base + scale * rng.standard_normal(base.shape))

        sets[modality] = EmbeddingSet(
            modality=modality,
            split=split,
            image=around(1.0),
            text=around(0.8),
            labels=labels,
            ids=[f"{modality}-{split}-{i:04d}" for i in range(len(labels))],
            prompts={
                kind: {
                    label: unit(direction[label] + 0.3 * rng.standard_normal((3, WIDTH)))
                    for label in LABELS
                    if label not in hidden
                }
                for kind in ("name", "findings")
            },
            simulated=True,
        )
    return sets


@pytest.fixture(scope="session")
def test_sets():
    return {s: make_stage(s, "test") for s in ("before", "aligned", "distilled", "control")}


@pytest.fixture(scope="session")
def train_sets():
    return {s: make_stage(s, "train", per_label=20) for s in ("before", "aligned")}


@pytest.fixture(scope="session")
def metrics(test_sets, train_sets):
    from m3bind.eval.evaluate import evaluate
    from m3bind.eval.metrics import assemble

    stages = ("phantom", "pretrain", "align", "distill", "control", "embed", "evaluate")
    return assemble(
        evaluate(test_sets, train_sets, seed=3, num_shot_seeds=3),
        seconds={stage: 12.5 * i for i, stage in enumerate(stages, 1)},
        peak_rss_mib={stage: 900.0 + i for i, stage in enumerate(stages)},
        simulated=True,
        seed=3,
        extra={"commit": "0123abc"},
    )
