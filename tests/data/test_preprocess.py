"""Preprocess: what goes together, its defaults, its fingerprint."""

import dataclasses

import pytest

from m3bind.data.constants import KIND
from m3bind.data.preprocess import Preprocess

GOOD = {"kind": "image2d", "size": (64, 48), "channels": 3}


@pytest.mark.parametrize("modality", KIND)
def test_defaults_of_each_modality_survive_json(modality: str) -> None:
    preprocess = Preprocess.for_modality(modality)
    assert preprocess.kind == KIND[modality]
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess


def test_a_modality_of_ones_own_needs_its_kind() -> None:
    with pytest.raises(ValueError, match="'ultrasound' is not one of xray"):
        Preprocess.for_modality("ultrasound")
    own = Preprocess.for_modality("ultrasound", "image2d", (80, 80))
    assert (own.kind, own.size) == ("image2d", (80, 80))


def test_the_fingerprint_changes_with_every_field() -> None:
    base = Preprocess(**GOOD)
    others = {
        "size": (64, 64), "channels": 1, "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic",
        "fit": "crop", "minmax": True, "hu_windows": ((-160.0, 240.0),), "rate_hz": 100,
    }  # fmt: skip
    prints = {base.fingerprint()}
    prints |= {dataclasses.replace(base, **{k: v}).fingerprint() for k, v in others.items()}
    prints.add(dataclasses.replace(base, fit="crop", resize=80).fingerprint())
    assert len(prints) == len(others) + 2
    assert Preprocess(**GOOD).fingerprint() == base.fingerprint()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "video"}, "kind 'video'"),
        ({"size": (64,)}, "needs 2 axes"),
        ({"size": (64, 0)}, "needs 2 axes"),
        ({"channels": 4}, "channels 4"),
        ({"mean": (0.1, 0.2)}, "mean"),
        ({"std": (0.0,)}, "must be positive"),
        ({"interpolation": "nearest"}, "'nearest'"),
        ({"fit": "squash"}, "'squash'"),
        ({"resize": 100}, "resize 100 needs fit 'crop'"),
        ({"fit": "crop", "resize": 50}, "at least"),
        ({"hu_windows": ((100.0, -100.0),)}, "hu_windows"),
        ({"kind": "volume", "size": (4, 4, 4), "channels": 2}, "number of hu_windows, 1"),
        (
            {
                "kind": "volume",
                "size": (4, 4, 4),
                "channels": 2,
                "minmax": True,
                "hu_windows": ((-1000.0, 0.0), (0.0, 1000.0)),
            },
            "minmax of kind volume needs one window",
        ),
        ({"rate_hz": 1000}, "rate_hz 1000"),
    ],
)
def test_values_that_do_not_go_together(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**{**GOOD, **change})
