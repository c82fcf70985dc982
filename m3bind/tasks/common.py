"""What the tasks share: drawing texts, parameter groups, and the base class."""

import random
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from m3bind.data.reports import sample_section, sections

Report = dict[str, float]
Losses = dict[str, Tensor]


class HasImagesAndReports(Protocol):
    """What a task reads of a loader's batch."""

    images: Tensor
    reports: list[str]


Batches = Mapping[str, HasImagesAndReports]


class Task(nn.Module):
    """``forward(batches, rng) -> (losses, report)``; the trainer adds up the losses.

    ``batches`` maps a modality to its batch. All that a task draws at random comes from
    ``rng`` and from torch's generator, so a resumed run draws the same.
    """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW: matrices and kernels decay; norms, biases and scales do not."""
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for parameter in self.parameters():
            if parameter.requires_grad:
                (decayed if parameter.ndim >= 2 else kept).append(parameter)
        groups: list[dict[str, Any]] = [{"params": decayed}]
        return groups + ([{"params": kept, "weight_decay": 0.0}] if kept else [])

    def trainable_state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: all that training changes, by name."""
        raise NotImplementedError

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trainable_state`; raises ValueError for keys that do not fit."""
        raise NotImplementedError


def draw_sections(reports: Iterable[str], rng: random.Random) -> list[str]:
    """One random section of each report; the whole report where the section is a repetition.

    Two patients of a batch with one impression would each be the other's false negative.
    """
    drawn: list[str] = []
    for report in reports:
        section = sample_section(report, rng)
        drawn.append(sections(report).whole if section in drawn else section)
    return drawn


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def without_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


def take(batches: Batches, modalities: Iterable[str]) -> None:
    """Raise ValueError unless ``batches`` holds exactly ``modalities``."""
    if set(batches) != set(modalities):
        raise ValueError(f"batches of {sorted(batches)} given, of {sorted(modalities)} needed")
