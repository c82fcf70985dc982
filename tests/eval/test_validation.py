"""The score of a validation split: a sum of figures, and not a number where there is none."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from m3bind.validation import Validation

SCORES = ("zero_shot.{}.name.mean", "retrieval.{}.normalised.mean")


def validate(sets) -> dict[str, float]:
    def embedder(item):
        class Embedder:
            expert = SimpleNamespace(modality=item.modality)

            def __call__(self, text):
                return item

        return Embedder()

    return Validation([embedder(item) for item in sets], SCORES)()


def test_the_score_is_the_sum_of_what_can_be_measured(test_sets):
    found = validate(test_sets["aligned"].values())
    assert set(found) == {"score", "zero_shot.name.mean", "retrieval.normalised.mean"}
    assert found["score"] == pytest.approx(sum(found.values()) - found["score"])


def test_without_labels_the_score_is_not_a_number(test_sets):
    unlabelled = [
        dataclasses.replace(item, labels=[""] * len(item)) for item in test_sets["aligned"].values()
    ]
    found = validate(unlabelled)
    assert set(found) == {"score"} and math.isnan(found["score"])


def test_a_label_without_a_prompt_names_modality_and_kind(test_sets):
    item = test_sets["aligned"]["ct"]
    prompts = {
        **item.prompts,
        "findings": {k: item.prompts["findings"][k] for k in item.labels[:2]},
    }
    with pytest.raises(ValueError, match=r"no prompt for .* in the 'findings' prompts of ct"):
        validate([dataclasses.replace(item, prompts=prompts)])
