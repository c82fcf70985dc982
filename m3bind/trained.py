"""The experts and text encoders of a run: built as configured, with what each stage made of them.

A stage that was trained remembers what it began from, so that weights, embeddings and figures of
two trainings in one folder are never mixed.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch

from m3bind.config import Config, ExpertConfig
from m3bind.data.audit import check_patients
from m3bind.data.dataset import Dataset
from m3bind.data.shards import shard_paths, shards_content
from m3bind.errors import M3BindError
from m3bind.eval.store import EmbeddingSet, load_stage, stage_path
from m3bind.models.expert import Expert, build_expert, build_text_encoder
from m3bind.models.published import (
    WEIGHTS,
    as_configured,
    contents,
    identity,
    restore,
    started_from,
)
from m3bind.models.text import TextEncoder
from m3bind.parallel import device, size

log = logging.getLogger(__name__)

# stage of the evaluation -> (folder of its experts, folder of its shared text encoder)
SOURCES: dict[str, tuple[str, str | None]] = {
    "before": ("pretrain", None),
    "aligned": ("align", None),
    "distilled": ("align", "distill"),
    "control": ("pretrain", "control"),
}
# folder of what was trained -> (stage that it began from, command that trains it)
TRAINED_FROM = {
    "align": ("before", "align"),
    "distill": ("aligned", "distill"),
    "control": ("before", "distill --control"),
}


class Trained:
    """What was, or can be, trained with one configuration and in one folder."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.device = device()
        self.dataset = Dataset.load(config.data)
        check_patients(config.data)
        known = self.dataset.modalities
        for modality in config.experts:
            if modality not in known:
                raise M3BindError(
                    f"experts.{modality}: the data set {config.data} has no such modality, only "
                    f"{', '.join(known)}"
                )
        self.modalities = [m for m in known if m in (config.experts or known)]
        if config.threads:
            torch.set_num_threads(config.threads)

    def experts(self, stage: str, modalities: list[str] | None = None) -> dict[str, Expert]:
        """The experts of a stage, their trunks frozen; ``before`` without weights: as built."""
        source = SOURCES[stage][0]
        experts = {}
        for modality in modalities or self.modalities:
            expert = experts[modality] = self._build(modality)
            folder = self.folder / source / modality
            if (folder / WEIGHTS).is_file():
                restore(expert, folder, f"experts.{modality}.")
            elif source == "align":
                raise M3BindError(f"no aligned expert at {folder}: run m3bind align first")
            expert.freeze_trunk()
        # The first rank speaks for all, whichever experts it holds itself.
        for modality in self.modalities if size() > 1 else experts:
            if source != "align" and not (self.folder / source / modality / WEIGHTS).is_file():
                log.warning(
                    "%s: no expert at %s: starting from its towers as configured; run m3bind "
                    "pretrain first unless their weights are pre-trained", modality,
                    self.folder / source / modality,
                )  # fmt: skip
        self._check_start(stage)
        return experts

    def text_encoder(self, stage: str) -> TextEncoder:
        """The shared text encoder of ``distilled`` or ``control``."""
        source = str(SOURCES[stage][1])
        folder = self.folder / source
        if not (folder / WEIGHTS).is_file():
            command = TRAINED_FROM[source][1]
            raise M3BindError(f"no text encoder at {folder}: run m3bind {command} first")
        student = self._build_student()
        restore(student, folder, f"experts.{self.modalities[0]}.")
        self._check_start(stage)
        return student

    def trained_stages(self) -> list[str]:
        """The stages whose weights are there (``before`` always is)."""
        found = []
        for stage, (experts, text) in SOURCES.items():
            path = self.folder / (text or f"{experts}/{self.modalities[0]}") / WEIGHTS
            if stage == "before" or path.is_file():
                found.append(stage)
        return found

    def origin(self, stage: str, modality: str, split: str) -> dict[str, Any]:
        """What the embeddings of a stage are made of now; changes with any of it."""
        self._check_start(stage)
        image, text = self._start(stage)[modality], SOURCES[stage][1]
        data = shards_content(shard_paths(self.dataset.root, modality, split))
        prompts = json.dumps(self.dataset.modalities[modality].prompts)
        return {
            "seed": self.config.seed,
            "width": self.config.width,
            "image weights": image,
            "text weights": contents(self.folder / text) if text else image,
            "shards": data,
            "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16],
        }

    def embedded(self, split: str) -> dict[str, dict[str, EmbeddingSet]]:
        """The embeddings of each stage, by modality; refused if any is not of this run as it is."""
        root, found = self.folder / "embeddings", dict[str, dict[str, EmbeddingSet]]()
        wanted = [m for m in self.modalities if shard_paths(self.dataset.root, m, split)]
        for stage in SOURCES:
            sets = load_stage(root, stage, split)
            for modality in wanted if sets else ():
                path = stage_path(root, stage, modality, split)
                again = f"run m3bind embed --stage {stage} again"
                if modality not in sets:
                    raise M3BindError(f"no {path}, though others were embedded: {again}")
                then = sets[modality].origin
                for key, now in self.origin(stage, modality, split).items():
                    if then.get(key) != now:
                        raise M3BindError(
                            f"{path} was made with {key} = {then.get(key)}, now it is {now}: set "
                            f"it back, or {again}"
                        )
            if sets:
                found[stage] = {modality: sets[modality] for modality in wanted}
        return found

    def _start(self, stage: str) -> dict[str, str]:
        """What stands for the weights of each expert of a stage."""
        folder = self.folder / SOURCES[stage][0]
        return {
            m: contents(folder / m) or as_configured(self._config_of(m)) for m in self.modalities
        }

    def _check_start(self, stage: str) -> None:
        """Refuse a stage whose training began from other weights than those that are there now."""
        for name in SOURCES[stage]:
            if name not in TRAINED_FROM:
                continue
            source, command = TRAINED_FROM[name]
            for modality in self.modalities:
                folder = self.folder / name / (modality if name == "align" else "")
                before = self.folder / SOURCES[source][0] / modality
                now, then = contents(before), started_from(folder).get(modality)
                if None not in (now, then) and now != then:
                    raise M3BindError(
                        f"{folder} was trained from other weights than those in {before} now: "
                        f"run m3bind {command} again"
                    )

    def _settings(self, modalities: list[str], stage: str | None) -> dict[str, Any]:
        """What a training is resumed with only if it is as it was; ``stage`` it begins from."""
        found: dict[str, Any] = {"width": self.config.width}
        for modality in modalities:
            own = identity(self._config_of(modality))
            found |= {f"experts.{modality}.{key}": value for key, value in own.items()}
            if stage is not None:
                folder = self.folder / SOURCES[stage][0] / modality
                found[str(folder.relative_to(self.folder) / WEIGHTS)] = contents(folder)
        return found

    def _config_of(self, modality: str) -> ExpertConfig:
        return self.config.experts.get(modality) or ExpertConfig()

    def _build(self, modality: str) -> Expert:
        try:
            return build_expert(
                self._config_of(modality),
                modality,
                width=self.config.width,
                seed=self.config.seed,
                kind=self.dataset.modalities[modality].kind,
            ).to(self.device)
        except (ValueError, M3BindError) as error:  # which of several experts, it cannot know
            raise M3BindError(f"experts.{modality}: {error}") from None

    def _build_student(self) -> TextEncoder:
        # The shared encoder is built like the first expert's text tower, and trained anew.
        settings = self._config_of(self.modalities[0])
        return build_text_encoder(
            settings.text,
            settings.lora,
            width=self.config.width,
            seed=self.config.seed,
            head_hidden=settings.head_hidden,
        ).to(self.device)


def fingerprint(stages: dict[str, dict[str, EmbeddingSet]]) -> str:
    """Of which embeddings figures are: changes with the origin of any of them."""
    origins = {stage: {m: s.origin for m, s in sets.items()} for stage, sets in stages.items()}
    return hashlib.sha256(json.dumps(origins, sort_keys=True).encode()).hexdigest()[:16]
