"""What the tasks share: drawing texts, parameter groups, and the base class."""

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from m3bind.data.reports import sample_section, sections
from m3bind.parallel import gathered_objects, rank

Report = dict[str, float]
Losses = dict[str, Tensor]


class HasImagesAndReports(Protocol):
    """What a task reads of a loader's batch."""

    images: Tensor
    reports: list[str]
    meta: list[dict[str, Any]]


Batches = Mapping[str, HasImagesAndReports]


class Task(nn.Module):
    """``forward(batches, rng) -> (losses, report)``; the trainer adds up the losses.

    ``batches`` maps a modality to its batch. All that a task draws at random comes from
    ``rng`` and from torch's generator, so a resumed run draws the same. Over ranks ``batches`` are
    this rank's part, and ``rng`` is the same on all: however many there are, and whichever experts
    one holds, it is drawn from as often.
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


def draw_key(rng: random.Random) -> int:
    """What `draw_sections` draws by, once a step."""
    return rng.getrandbits(64)


def draw_sections(
    reports: Sequence[str], key: int, modality: str = "", group: Any = None
) -> list[str]:
    """One random section of each report; the whole report where an earlier one drew the same.

    Two patients of a batch with one impression would each be the other's false negative. The
    draws depend on ``key``, ``modality`` and a report's place in the batch, which is that of all
    ranks of ``group`` (None: of all) one after the other: they are the same for any number.
    """
    first = sum(gathered_objects(len(reports), group)[: rank(group)])
    drawn = [
        sample_section(report, random.Random(f"{key}/{modality}/{first + row}"))
        for row, report in enumerate(reports)
    ]
    own = [_number(text) for text in drawn]
    earlier = {name for part in gathered_objects(own, group)[: rank(group)] for name in part}
    for row, (name, report) in enumerate(zip(own, reports, strict=True)):
        if name in earlier:
            drawn[row] = sections(report).whole
        earlier.add(name)
    return drawn


def copies(batch: HasImagesAndReports, group: Any = None) -> Tensor | None:
    """`mask_ids` of a batch that holds a sample more than once: one across the end of an epoch, or
    larger than the split. Copies are not each other's negatives. None where there are none, on all
    ranks of ``group``.
    """
    own = [_number(sample["id"]) for sample in batch.meta]
    whole = [name for part in gathered_objects(own, group) for name in part]
    if len(set(whole)) == len(whole):
        return None
    return torch.tensor(own, device=batch.images.device)


def _number(text: str) -> int:
    """Of 64 bits, the same in every process."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def without_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


def take(batches: Batches, modalities: Iterable[str]) -> None:
    """Raise ValueError unless ``batches`` holds exactly ``modalities``."""
    if set(batches) != set(modalities):
        raise ValueError(f"batches of {sorted(batches)} given, of {sorted(modalities)} needed")
