"""The stages of a run: what each reads, trains, validates and writes, and where.

A run's folder holds::

    pretrain/<modality>/  align/<modality>/  distill/  control/    weights; logs and checkpoints
    text_cache/  features/    what frozen text layers and image trunks give, where it is kept
    embeddings/<stage>/<modality>-<split>.safetensors
    stages.json  metrics.json  report.html
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from m3bind.config import TrainConfig
from m3bind.data.features import FeatureLoader, Features
from m3bind.data.loader import Loader
from m3bind.data.reports import sections
from m3bind.data.shards import iter_reports, shard_paths
from m3bind.errors import M3BindError
from m3bind.eval.evaluate import evaluate
from m3bind.eval.gallery import fetch_from
from m3bind.eval.metrics import assemble, load_metrics, save_metrics
from m3bind.eval.report import write_report
from m3bind.eval.store import save_stage
from m3bind.measure import measured, read_stages
from m3bind.models.expert import Expert
from m3bind.models.hidden_cache import HiddenCache
from m3bind.models.minilm import MiniLM
from m3bind.models.published import publish
from m3bind.models.text import TextEncoder
from m3bind.tasks.align import Align
from m3bind.tasks.common import Task
from m3bind.tasks.distill import Distill
from m3bind.tasks.pretrain import Pretrain
from m3bind.train import FitResult, fit
from m3bind.trained import SOURCES, Trained, fingerprint
from m3bind.validation import SplitEmbedder, Validation

log = logging.getLogger(__name__)


class Run(Trained):
    """One configured run over one data set; each public method is the work of one command."""

    # Training

    def prepare_texts(self) -> None:
        """Compute what frozen text layers give for every text, so that each stage finds it."""
        self._prepared_texts({modality: self._build(modality) for modality in self.modalities})

    def prepare_features(self, modality: str) -> None:
        """Compute what the pretrained, then frozen trunk gives for every image, if it is kept."""
        if self._config_of(modality).image.cache:
            expert = self.experts("before", [modality])[modality]
            for split in ("train", "val", "test"):
                if shard_paths(self.dataset.root, modality, split):
                    self._loader(expert, split, 1, train=False)

    def pretrain(self, modality: str, *, resume: bool = False) -> FitResult:
        """Train one expert on its own modality; weights go to ``pretrain/<modality>``."""
        if modality not in self.modalities:
            raise M3BindError(f"--modality {modality}: this run has {', '.join(self.modalities)}")
        folder = self.folder / "pretrain" / modality
        with measured(self.folder, f"pretrain/{modality}", resume=resume):
            experts = {modality: self._build(modality)}
            self._prepared_texts(experts)
            validation = self._validation(experts, ("zero_shot.{}.name.mean",))
            task = Pretrain(experts[modality])
            settings = self._settings(list(experts), None)
            result = self._fit(
                task, experts, self.config.pretrain, folder, validation, settings, resume
            )
            publish(experts[modality], folder, {})
        return result

    def align(self, *, resume: bool = False) -> FitResult:
        """Stage 1; the aligned experts' weights go to ``align/<modality>``."""
        folder = self.folder / "align"
        with measured(self.folder, "align", resume=resume):
            experts, start = self.experts("before"), self._start("before")
            settings = self._settings(self.modalities, "before")
            task = Align(experts, self._prepared_texts(experts), self.config.align)
            validation = self._validation(
                experts, ("zero_shot.{}.name.mean", "retrieval.{}.normalised.mean")
            )
            result = self._fit(
                task, experts, self.config.align, folder, validation, settings, resume
            )
            for modality, expert in experts.items():
                publish(expert, folder / modality, {modality: start[modality]})
        return result

    def distill(self, *, control: bool = False, resume: bool = False) -> FitResult:
        """Stage 2; the text encoder goes to ``distill``, with ``control`` to ``control``."""
        name = "control" if control else "distill"
        folder, stage = self.folder / name, "before" if control else "aligned"
        with measured(self.folder, name, resume=resume):
            experts, start = self.experts(stage), self._start(stage)
            settings = self._settings(self.modalities, stage)
            student = self._build_student()
            self._prepared_texts(experts)
            task = Distill(student, experts, self.config.distill)
            validation = self._validation(
                experts, ("zero_shot.{}.name.mean", "text_retrieval.{}.mean"), student
            )
            result = self._fit(
                task, experts, self.config.distill, folder, validation, settings, resume
            )
            publish(student, folder, start)
        return result

    # Evaluation

    def embed(self, stage: str) -> None:
        """Embed the splits that the evaluation needs, with the encoders of one stage."""
        if stage not in SOURCES:
            raise M3BindError(f"--stage {stage}: the stages are {', '.join(SOURCES)}")
        with measured(self.folder, f"embed/{stage}"):
            experts = self.experts(stage)
            text = self.text_encoder(stage) if SOURCES[stage][1] else None
            self._prepared_texts(experts)
            # The few-shot probe fits on training images, and stage 2 leaves images as they are.
            for split in ("test",) if text else ("train", "test"):
                bar = tqdm(self._embedders(experts, split), desc=f"embed {stage}, {split}")
                sets = [embedder(text, texts=split == "test") for embedder in bar]
                for item in sets:
                    item.origin = self.origin(stage, item.modality, split)
                save_stage(self.folder / "embeddings", stage, sets)

    def evaluate(self) -> dict[str, Any]:
        """Judge every stage that was embedded, and write ``metrics.json``."""
        settings = self.config.evaluation
        test, train = self.embedded("test"), self.embedded("train")
        if not test:
            raise M3BindError(
                f"no embeddings of a test split in {self.folder / 'embeddings'}: run m3bind embed "
                "first"
            )
        with measured(self.folder, "eval"):
            found = evaluate(
                test,
                train,
                seed=self.config.seed,
                num_permutations=settings.permutations,
                shots=settings.shots,
                num_shot_seeds=settings.seeds,
                progress=True,
            )
        stages = read_stages(self.folder)
        metrics = assemble(
            found,
            seconds={stage: entry["seconds"] for stage, entry in stages.items()},
            peak_rss_mib={stage: entry["peak_rss_mib"] for stage, entry in stages.items()},
            simulated=self.dataset.simulated,
            seed=self.config.seed,
            extra={"embeddings": fingerprint(test)},
        )
        save_metrics(metrics, self.folder / "metrics.json")
        return metrics

    def report(self) -> Path:
        """Write ``report.html`` from ``metrics.json``, the embeddings and the logs."""
        path, test = self.folder / "metrics.json", self.embedded("test")
        if not path.is_file():
            raise M3BindError(f"no {path}: run m3bind eval first")
        metrics = load_metrics(path)
        if metrics.get("embeddings") != fingerprint(test):
            raise M3BindError(
                f"{path} is of other embeddings than are there: run m3bind eval again"
            )
        logs = {f"pretraining, {m}": self.folder / "pretrain" / m for m in self.modalities} | {
            "stage 1, align": self.folder / "align",
            "stage 2, distil": self.folder / "distill",
            "control: stage 2 without stage 1": self.folder / "control",
        }
        histories = {title: folder / "metrics.jsonl" for title, folder in logs.items()}
        with measured(self.folder, "report"):
            return write_report(
                self.folder / "report.html",
                metrics,
                test=test,
                histories={title: path for title, path in histories.items() if path.is_file()},
                fetch=fetch_from(self.dataset.root),
                dataset=self.dataset.name,
                description=self._description(),
            )

    # What the methods above share

    def _description(self) -> str:
        """What a reader must know of how the experts were made."""
        texts = {self._config_of(m).text.source for m in self.modalities}
        images = {self._config_of(m).image.source for m in self.modalities}
        said = (
            f"One expert a modality: image towers {', '.join(sorted(images))}, text towers "
            f"{', '.join(sorted(texts))}, all in {self.config.width} dimensions. "
            f"Agreement of stage 1: {self.config.align.agreement}."
        )
        experts = [self._config_of(modality) for modality in self.modalities]
        if any(e.text.cache for e in experts):
            layers = max(e.text.train_layers for e in experts)
            said += (
                " The text towers' frozen layers are computed once for each text and their hidden "
                f"states kept; their last {layers} layers and the heads train."
                if layers
                else " The text towers are frozen, computed once for each text; their heads train."
            )
        if any(e.image.cache for e in experts):
            said += (
                " Stages 1 and 2 train the heads on features of the frozen image trunks, computed "
                "once for each image, without augmentation."
            )
        return said

    def _loader(
        self, expert: Expert, split: str, batch_size: int, *, train: bool
    ) -> Loader | FeatureLoader:
        """Batches of images; of features where the trunk is frozen and they are kept."""
        kept = expert.image.frozen and self._config_of(expert.modality).image.cache
        streamed = train and not kept
        # One pass takes small batches of volumes: CTs at their own resolution take gigabytes.
        small = 8 if expert.preprocess.kind == "volume" else 64
        images = Loader(
            self.dataset.root, expert.modality, split, expert.preprocess,
            batch_size if streamed else small,
            train=streamed, seed=self.config.seed, num_threads=self.config.pretrain.num_threads,
            prefetch=self.config.pretrain.prefetch,
        )  # fmt: skip
        if not kept:
            return images
        features = self._features(expert, split, images)
        return FeatureLoader(features, batch_size, train=train, seed=self.config.seed)

    def _features(self, expert: Expert, split: str, images: Loader) -> Features:
        """What a frozen trunk gives for a split: read, or computed and kept."""
        path = self.folder / "features" / f"{expert.modality}-{split}.safetensors"
        fingerprint = f"{expert.image.fingerprint()}/{images.content()}"
        found = Features.load(path, expert.modality, fingerprint)
        if found is None:
            device = expert.logit_scale.device
            bar = tqdm(images, desc=f"{expert.modality}, {split}: image features")
            found = Features.compute(
                bar, lambda batch: expert.eval().image_features(batch.to(device)), fingerprint
            )
            found.save(path)
        return found

    def _training_texts(self, modality: str) -> list[str]:
        """Every section, and every whole report, of the training split, as often as it occurs."""
        reports = iter_reports(self.dataset.root, modality, "train")
        parts = [sections(report) for report in reports]
        return [text for p in parts for text in (p.findings, p.impression, p.whole) if text]

    def _prepared_texts(self, experts: dict[str, Expert]) -> list[str]:
        """The training texts of all these modalities.

        Where a text tower keeps the hidden states of its frozen layers, those of every text that
        training, validation and test will ask for are computed here, or read from ``text_cache``
        if an earlier stage of a run in this folder computed them.
        """
        centre = {modality: self._training_texts(modality) for modality in experts}
        caches = {id(c): c for e in experts.values() if (c := _cache_of(e)) is not None}
        for cache in caches.values():
            for modality, texts in centre.items():
                path = self.folder / "text_cache" / f"{modality}-{cache.fingerprint}.safetensors"
                wanted = {*texts, *self._evaluation_texts(modality)}
                cache.load(path)
                if any(text not in cache for text in wanted):
                    bar = partial(tqdm, desc=f"{modality}: frozen text layers")
                    cache.precompute(wanted, bar)
                    cache.save(path, wanted)
        return [text for texts in centre.values() for text in texts]

    def _evaluation_texts(self, modality: str) -> set[str]:
        root = self.dataset.root
        prompts = self.dataset.modalities[modality].prompts.values()
        texts = {text for classes in prompts for one in classes.values() for text in one}
        for split in ("val", "test"):
            texts |= {sections(report).whole for report in iter_reports(root, modality, split)}
        return texts

    def _embedders(self, experts: dict[str, Expert], split: str) -> list[SplitEmbedder]:
        return [
            SplitEmbedder(
                expert,
                split,
                self._loader(expert, split, 64, train=False),
                self.dataset.modalities[modality].prompts,
            )
            for modality, expert in experts.items()
            if shard_paths(self.dataset.root, modality, split)
        ]

    def _validation(
        self, experts: dict[str, Expert], scores: tuple[str, ...], text: TextEncoder | None = None
    ) -> Validation | None:
        """None, so that the last weights count, where there is no labelled validation split."""
        embedders = self._embedders(experts, "val")
        if len(embedders) < len(experts):
            log.warning("no validation split for every modality: the last weights will be kept")
            return None
        return Validation(embedders, scores, text, seed=self.config.seed)

    def _fit(
        self,
        task: Task,
        experts: dict[str, Expert],
        settings: TrainConfig,
        folder: Path,
        validation: Validation | None,
        plain: dict[str, Any],
        resume: bool,
    ) -> FitResult:
        loaders = {
            modality: self._loader(expert, "train", settings.batch_size, train=True)
            for modality, expert in experts.items()
        }
        return fit(
            task, loaders, settings, folder,
            validate=validation, resume=resume, seed=self.config.seed, settings=plain,
            description=str(folder.relative_to(self.folder)),
        )  # fmt: skip


def _cache_of(expert: Expert) -> HiddenCache | None:
    tower = expert.text.tower
    return tower.cache if isinstance(tower, MiniLM) and tower.cached else None
