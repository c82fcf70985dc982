"""Pretraining, stage 1 and stage 2, on one rank or many."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m3bind.config import TrainConfig
from m3bind.errors import M3BindError
from m3bind.measure import measured
from m3bind.models.expert import Expert
from m3bind.models.published import publish
from m3bind.models.text import TextEncoder
from m3bind.parallel import Placement, is_first, meet, size
from m3bind.parallel.world import claimed_by_first, launched
from m3bind.stages.inputs import Inputs
from m3bind.tasks.align import Align
from m3bind.tasks.common import Task, without_prefix
from m3bind.tasks.distill import Distill
from m3bind.tasks.pretrain import Pretrain
from m3bind.train import FitResult, best_weights, fit, has_checkpoint
from m3bind.validation import Validation


class Training(Inputs):
    """The stages that train."""

    def pretrain(self, modality: str, *, resume: bool = False) -> FitResult:
        """Train one expert on its own modality; weights go to ``pretrain/<modality>``."""
        if modality not in self.modalities:
            raise M3BindError(f"--modality {modality}: this run has {', '.join(self.modalities)}")
        folder, placement = self.folder / "pretrain" / modality, Placement.of([modality])
        self._check_batches(self.config.pretrain, placement, frozen=False)
        with self._measured(f"pretrain/{modality}", resume):
            experts = {modality: self._build(modality)}
            self._prepare_texts(experts, placement)
            validation = self._validation(experts, ("zero_shot.{}.name.mean",), placement)
            task = Pretrain(experts[modality])
            result = self._fit(
                task, experts, self.config.pretrain, folder, validation, placement,
                self._settings([modality], None), resume,
            )  # fmt: skip
            if is_first():
                publish(self._best_expert(experts[modality], folder), folder, {})
            meet()
        return result

    def align(self, *, resume: bool = False) -> FitResult:
        """Stage 1; the aligned experts' weights go to ``align/<modality>``."""
        folder, config = self.folder / "align", self.config.align
        with self._measured("align", resume):
            placement = Placement.of(self.modalities, config.placement)
            self._check_batches(config, placement, frozen=True)
            start = self._start("before")
            experts = self.experts("before", list(placement.own))
            self._prepare_texts(experts, placement)
            task = Align(experts, self._texts(self.modalities), config, placement)
            validation = self._validation(
                experts, ("zero_shot.{}.name.mean", "retrieval.{}.normalised.mean"), placement
            )
            result = self._fit(
                task, experts, config, folder, validation, placement,
                self._settings(self.modalities, "before"), resume, group=placement.group,
            )  # fmt: skip
            if is_first():
                for modality in self.modalities:
                    expert = experts.get(modality) or self._build(modality)
                    best = self._best_expert(expert, folder, modality)
                    publish(best, folder / modality, {modality: start[modality]})
            meet()
        return result

    def distill(self, *, control: bool = False, resume: bool = False) -> FitResult:
        """Stage 2; the text encoder goes to ``distill``, with ``control`` to ``control``."""
        name = "control" if control else "distill"
        folder, stage = self.folder / name, "before" if control else "aligned"
        config = self.config.distill
        with self._measured(name, resume):
            placement = Placement.of(self.modalities, config.placement)
            self._check_batches(config, placement, frozen=True)
            start = self._start(stage)
            experts = self.experts(stage, list(placement.own))
            settings = self._settings(self.modalities, stage)
            student = self._build_student()
            self._prepare_texts(experts, placement)
            task = Distill(student, experts, config, placement)
            validation = self._validation(
                experts, ("zero_shot.{}.name.mean", "text_retrieval.{}.mean"), placement, student
            )
            result = self._fit(
                task, experts, config, folder, validation, placement, settings, resume
            )
            if is_first():
                publish(self._best_student(student, folder), folder, start)
            meet()
        return result

    @contextmanager
    def _measured(self, stage: str, resume: bool) -> Iterator[None]:
        since = launched()
        with claimed_by_first(self.folder / stage):
            if not is_first():
                yield
                return
            again = has_checkpoint(self.folder / stage, since)
            with measured(self.folder, stage, resume=resume or again):
                yield

    def _fit(
        self,
        task: Task,
        experts: dict[str, Expert],
        settings: TrainConfig,
        folder: Path,
        validation: Validation | None,
        placement: Placement,
        plain: dict[str, Any],
        resume: bool,
        group: Any = None,
    ) -> FitResult:
        return fit(
            task, self._training_batches(experts, settings, placement), settings, folder,
            validate=validation, resume=resume, seed=self.config.seed, settings=plain,
            description=str(folder.relative_to(self.folder)), group=group,
        )  # fmt: skip

    # Over ranks the trained modules may be spread, or lie elsewhere: the first rank builds anew.

    def _best_expert(self, expert: Expert, folder: Path, prefix: str = "") -> Expert:
        if size() == 1:
            return expert
        weights = best_weights(folder)
        built = self._build(expert.modality)
        built.load_trainable_state(without_prefix(prefix, weights) if prefix else weights)
        return built

    def _best_student(self, student: TextEncoder, folder: Path) -> TextEncoder:
        if size() == 1:
            return student
        built = self._build_student()
        built.load_trainable_state(best_weights(folder))
        return built
