"""The committed table of the cohort (cohort.yaml): labels, signs and prompts of every modality."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class ModalityTable:
    """What one modality can show."""

    kind: str
    labels: tuple[str, ...]
    signs: dict[str, str]
    prompts: dict[str, dict[str, list[str]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Labels in index order, the words that name them, and the modalities."""

    labels: tuple[str, ...]
    names: dict[str, tuple[str, ...]]
    modalities: dict[str, ModalityTable]

    def shared(self, first: str, second: str) -> tuple[str, ...]:
        """The conditions (without "none") that both modalities can show."""
        other = self.modalities[second].labels
        return tuple(x for x in self.modalities[first].labels if x in other and x != "none")


def package_yaml(name: str) -> dict[str, Any]:
    """A YAML file that lies beside this module."""
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return yaml.safe_load(text)


@cache
def table() -> Table:
    """cohort.yaml, read once."""
    raw = package_yaml("cohort.yaml")
    labels = tuple(raw["labels"])
    modalities = {
        name: ModalityTable(
            kind=spec["kind"],
            labels=tuple(x for x in labels if x in spec["signs"]),
            signs=spec["signs"],
            prompts=spec["prompts"],
        )
        for name, spec in raw["modalities"].items()
    }
    names = {label: tuple(words) for label, words in raw["names"].items()}
    return Table(labels=labels, names=names, modalities=modalities)
