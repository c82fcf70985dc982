"""What can be set: dataclasses, of which every key has a type and a default, and the values that
are in range. `m3bind.settings` reads them."""

import dataclasses
import math
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3bind import settings
from m3bind.dtypes import BF16
from m3bind.errors import M3BindError

AGREEMENTS = ("mse", "cosine", "infonce", "relational")
PARALLEL = ("ddp", "fsdp")
PLACEMENTS = ("replicated", "split")
# Fewer texts have nothing to be told apart from, or no distribution over the others.
LEAST_CENTRE_BATCH = {"infonce": 2, "relational": 3}

# Of threads, processes and batches held ready: more than any machine has use for.
MOST_THREADS = 1024
MOST_PREFETCHED = 64
MOST_SEED = 2**32 - 1  # of DALI and NumPy

Problem = tuple[str, Any, str]  # key, value, what it should be


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters; ``targets`` None discovers query and value projections."""

    r: int = 8
    alpha: float = 8.0
    dropout: float = 0.1
    targets: list[str] | None = None

    def problems(self) -> Iterator[Problem]:
        yield from _outside(self, r=1, alpha=0)
        if not 0 <= self.dropout < 1:
            yield "dropout", self.dropout, "must be at least 0 and below 1"


@dataclass(kw_only=True, slots=True)
class ImageTowerConfig:
    """An image tower: ``small``, ``timm:<name>``, ``open_clip:<name>`` or ``hf:<folder>``.

    ``size`` is [H, W], [D, H, W] or [T]; None takes the tower's or the modality's own.
    ``freeze`` keeps the trunk as it is; the head into the shared width is always trained.
    ``cache`` keeps what a frozen trunk gives for each image: stages 1 and 2 then train on features
    of images as they are, without augmentation, which is far faster.
    """

    source: str = "small"
    weights: str | None = None
    size: list[int] | None = None
    freeze: bool = False
    cache: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> Iterator[Problem]:
        if self.size is not None and (not 1 <= len(self.size) <= 3 or min(self.size) < 1):
            yield "size", self.size, "must be [H, W], [D, H, W] or [T], all positive"


@dataclass(kw_only=True, slots=True)
class TextTowerConfig:
    """A text tower: ``minilm``, ``open_clip:<name>`` or ``hf:<folder>``.

    ``train_layers`` counts the last layers that train; ``cache`` keeps the hidden states that
    the frozen layers below them give for each text, ``frozen_bf16`` computes those layers with
    bfloat16 matrix products (both for minilm only; ``auto``: where that is faster).
    """

    source: str = "minilm"
    weights: str | None = None
    max_tokens: int = 64
    train_layers: int = 1
    cache: bool = False
    frozen_bf16: bool | str = False

    def problems(self) -> Iterator[Problem]:
        yield from _outside(self, max_tokens=2, train_layers=0)
        yield from _not_among(self, frozen_bf16=BF16)


@dataclass(kw_only=True, slots=True)
class ExpertConfig:
    """One modality's image tower and text tower; ``seed`` None derives one from the name.

    ``head_hidden`` is the width of a hidden layer beside the projection in both heads (0: none).
    """

    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    lora: LoraConfig | None = None
    head_hidden: int = 0
    seed: int | None = None

    def problems(self) -> Iterator[Problem]:
        yield from _outside(self, head_hidden=0, seed=(0, MOST_SEED))
        image = self.image
        if image.cache and self.lora is not None and image.source != "small" and not image.freeze:
            yield "image.cache", True, "must be false where lora trains the trunk (or freeze it)"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """One training run. ``clip`` is the largest gradient norm (0: no clipping).

    ``batch_size`` counts the samples of a modality in a batch, on all ranks together;
    ``batch_sizes`` names those that have another. A step takes the mean over ``accumulate`` batches
    (each contrasted within itself). ``parallel`` says how ranks share the work: ``ddp`` holds what
    is trained on each, ``fsdp`` spreads it over them. ``bf16`` is autocast, ``auto`` where it is
    faster: see `m3bind.dtypes.multiplies_bf16`; where a training goes on elsewhere, it asks again.

    ``num_threads`` are the threads of each modality's loader, ``prefetch`` the batches that it
    holds ready: 1 spares memory, and where no core is idle it costs no time. Images that are not
    trained on are loaded as `pretrain` says.
    """

    steps: int = 300
    batch_size: int = 64
    batch_sizes: dict[str, int] = field(default_factory=dict)
    accumulate: int = 1
    parallel: str = "ddp"
    lr: float = 1e-3
    weight_decay: float = 1e-2
    warmup: int = 20
    clip: float = 1.0
    bf16: bool | str = False
    validate_every: int = 50
    log_every: int = 10
    checkpoint_every: int = 50
    num_threads: int = 1
    prefetch: int = 2

    def problems(self) -> Iterator[Problem]:
        yield from _outside(
            self, steps=1, batch_size=2, accumulate=1, weight_decay=0, warmup=0, clip=(0, math.inf),
            validate_every=1, log_every=1, checkpoint_every=1, num_threads=(1, MOST_THREADS),
            prefetch=(1, MOST_PREFETCHED),
        )  # fmt: skip
        for modality, rows in self.batch_sizes.items():
            if rows < 2:  # one sample has nothing to be told apart from
                yield f"batch_sizes.{modality}", rows, "must be at least 2"
        if not 0 < self.lr < math.inf:
            yield "lr", self.lr, "must be a number above 0"
        yield from _not_among(self, parallel=PARALLEL, bf16=BF16)

    def batch_of(self, modality: str) -> int:
        """The samples of a modality in a batch, on all ranks together."""
        return self.batch_sizes.get(modality, self.batch_size)


@dataclass(kw_only=True, slots=True)
class AlignConfig(TrainConfig):
    """Stage 1: every expert's own loss, plus agreement of the experts on centre texts.

    ``agreement``: ``mse`` and ``cosine`` compare embeddings text by text; ``infonce`` has each
    expert find a text's embedding by another expert among those of all texts; ``relational``
    compares only how near each text is to the others, so it leaves the spaces free to be turned.
    ``preserve_weight`` weighs the KL divergence to the frozen original experts (0: off).
    ``placement`` over ranks: ``replicated`` has every rank hold all experts; ``split`` has each
    hold one, and only embeddings of centre texts travel between the groups of ranks.
    """

    agreement: str = "mse"
    agreement_weight: float = 1.0
    centre_batch: int = 64
    preserve_weight: float = 0.0
    placement: str = "replicated"

    def problems(self) -> Iterator[Problem]:
        yield from TrainConfig.problems(self)
        yield from _outside(self, agreement_weight=0, centre_batch=1, preserve_weight=0)
        yield from _not_among(self, agreement=AGREEMENTS, placement=PLACEMENTS)
        least = LEAST_CENTRE_BATCH.get(self.agreement, 1)
        if self.centre_batch < least:
            remedy = f"must be at least {least} with agreement={self.agreement}"
            yield "centre_batch", self.centre_batch, remedy


@dataclass(kw_only=True, slots=True)
class DistillConfig(TrainConfig):
    """Stage 2: the weights of the three terms that make one text encoder out of many.

    ``placement`` over ranks, as in stage 1: all experts on every rank, or one on each.
    """

    cosine_weight: float = 1.0
    contrast_weight: float = 1.0
    similarity_weight: float = 1.0
    placement: str = "replicated"

    def problems(self) -> Iterator[Problem]:
        yield from TrainConfig.problems(self)
        yield from _not_among(self, placement=PLACEMENTS)
        weights = ("cosine_weight", "contrast_weight", "similarity_weight")
        yield from _outside(self, **dict.fromkeys(weights, 0))
        if not any(getattr(self, name) for name in weights):
            yield weights[0], 0.0, f"{', '.join(weights)}: at least one must be above 0"


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Examples a class of the few-shot probe, its seeds, and permutations for chance."""

    shots: list[int] = field(default_factory=lambda: [1, 4, 16])
    seeds: int = 5
    permutations: int = 200

    def problems(self) -> Iterator[Problem]:
        yield from _outside(self, seeds=1, permutations=1)
        if not self.shots or min(self.shots) < 1:
            yield "shots", self.shots, "must be a list of positive numbers"


@dataclass(kw_only=True, slots=True)
class PhantomConfig:
    """Patients a modality of the simulated cohort; ``workers`` None takes every core."""

    train: int = 1512
    val: int = 210
    test: int = 420
    seed: int = 0
    workers: int | None = None

    def problems(self) -> Iterator[Problem]:
        yield from _outside(
            self, train=1, val=1, test=1, seed=(0, MOST_SEED), workers=(1, MOST_THREADS)
        )


@dataclass(kw_only=True, slots=True)
class Config:
    """Everything that one run needs; ``experts`` maps the name of a modality to its expert."""

    data: str = "data/phantom"
    output: str = "runs/demo"
    seed: int = 0
    width: int = 256
    threads: int | None = None
    experts: dict[str, ExpertConfig] = field(default_factory=dict)
    pretrain: TrainConfig = field(default_factory=TrainConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    phantom: PhantomConfig = field(default_factory=PhantomConfig)

    def problems(self) -> Iterator[Problem]:
        yield from _outside(self, seed=(0, MOST_SEED), width=1, threads=(1, MOST_THREADS))


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file into a `Config`; ``overrides`` such as ``"align.steps=50"`` win over it.

    Raises M3BindError, in one line, for a missing or malformed file, an unknown key, and a
    value of the wrong type or out of range.
    """
    config: Config = settings.read(path, overrides, Config)
    source = f"{path}" + (" with overrides" if overrides else "")
    for key, value, remedy in find_problems(config):
        raise M3BindError(f"{source}: {key} = {value!r}: {remedy}")
    return config


def find_problems(config: Any, prefix: str = "") -> Iterator[Problem]:
    """Yield every value out of range in a tree of settings, by its full key."""
    if isinstance(config, dict):
        for name, part in config.items():
            yield from find_problems(part, f"{prefix}{name}.")
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        if hasattr(config, "problems"):
            for key, value, remedy in config.problems():
                yield f"{prefix}{key}", value, remedy
        for part in dataclasses.fields(config):
            yield from find_problems(getattr(config, part.name), f"{prefix}{part.name}.")


def _outside(config: Any, **limits: float | tuple[float, float]) -> Iterator[Problem]:
    """Values that are not from `low` to `high` (where a limit names one alone, not finite)."""
    for key, limit in limits.items():
        value = getattr(config, key)
        low, high = limit if isinstance(limit, tuple) else (limit, sys.float_info.max)
        if value is None or low <= value <= high:
            continue
        if not value > high:  # so written, NaN is among them
            yield key, value, f"must be at least {low}"
        else:
            yield key, value, "must be finite" if value == math.inf else f"must be at most {high}"


def _not_among(config: Any, **choices: tuple[bool | str, ...]) -> Iterator[Problem]:
    for key, names in choices.items():
        if getattr(config, key) not in names:
            as_in_yaml = ", ".join(str(name).lower() for name in names)
            yield key, getattr(config, key), f"must be one of {as_in_yaml}"
