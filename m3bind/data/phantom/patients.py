"""Simulated patients: who they are is drawn here, how they look in a modality is drawn there.

Every patient has one number that is unique over modalities and splits, so that nobody can be in
two of either, and everything about a patient follows from (seed, number): neither the number of
workers nor the size of the cohort changes anybody.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from m3bind.data.constants import SPLITS
from m3bind.data.phantom.table import table

SEVERITIES = ("mild", "moderate", "severe")
# Room for a million patients in each (modality, split).
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Patient:
    """One simulated patient, who is examined once, by one modality."""

    number: int
    pseudonym: str
    modality: str
    split: str
    label: str
    age: int
    sex: str
    severity: str
    side: str
    habitus: float  # -1 slim ... +1 heavy
    seed: int

    @property
    def strength(self) -> float:
        """How strongly the signs show: 0.6, 0.8 or 1."""
        return 0.6 + 0.2 * SEVERITIES.index(self.severity)

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator of this patient's own for "image", "report", ..."""
        tag = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=4).digest(), "big")
        return np.random.default_rng((self.seed, self.number, tag))

    def attributes(self) -> dict[str, Any]:
        """What the report and the metadata may tell."""
        return {"age": self.age, "sex": self.sex, "severity": self.severity, "side": self.side}


def patient_number(modality: str, split: str, index: int) -> int:
    """The number of the index-th patient of a modality and split, unique over all of them."""
    if not 0 <= index < _BLOCK:
        raise ValueError(
            f"patient index {index} is outside 0..{_BLOCK - 1}: ask for fewer patients"
        )
    room = list(table().modalities).index(modality) * len(SPLITS) + SPLITS.index(split)
    return room * _BLOCK + index


def make_patient(modality: str, split: str, index: int, seed: int) -> Patient:
    """The index-th patient of a modality and split. Labels come in shuffled rounds of one each."""
    number = patient_number(modality, split, index)
    labels = table().modalities[modality].labels
    place = index % len(labels)
    order = np.random.default_rng((seed, number - place, 1)).permutation(len(labels))
    rng = np.random.default_rng((seed, number, 0))
    digest = hashlib.blake2b(f"m3bind phantom {seed} {number}".encode(), digest_size=8)
    return Patient(
        number=number,
        pseudonym=digest.hexdigest(),
        modality=modality,
        split=split,
        label=labels[order[place]],
        age=int(np.clip(rng.normal(61, 13), 28, 92)),
        sex=str(rng.choice(["woman", "man"])),
        severity=str(rng.choice(SEVERITIES)),
        side=str(rng.choice(["left", "right"])),
        habitus=float(np.clip(rng.normal(0, 0.5), -1, 1)),
        seed=seed,
    )
