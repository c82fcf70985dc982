"""What the stages read: texts, images or features of them, and what is kept of frozen layers."""

import logging
from collections.abc import Iterable
from functools import partial

from m3bind.bars import progress_bar
from m3bind.config import TrainConfig
from m3bind.data.features import FeatureLoader, Features
from m3bind.data.loader import Loader
from m3bind.data.reports import sections
from m3bind.data.shards import iter_reports, shard_paths
from m3bind.errors import M3BindError
from m3bind.models.expert import Expert
from m3bind.models.hidden_cache import HiddenCache
from m3bind.models.minilm import MiniLM
from m3bind.models.text import TextEncoder
from m3bind.parallel import Placement, first_before_others, gathered_objects, meet_after
from m3bind.trained import Trained
from m3bind.validation import SplitEmbedder, Validation

log = logging.getLogger(__name__)


class Inputs(Trained):
    """Loaders, texts and validation of a run.

    What frozen layers give is computed by the first of the ranks that need it, and read by the
    others.
    """

    def prepare_texts(self) -> None:
        """Compute what frozen text layers give for every text, so that each stage finds it."""
        self._prepare_texts({modality: self._build(modality) for modality in self.modalities})

    def prepare_features(self, modality: str) -> None:
        """Compute what the pretrained, then frozen trunk gives for every image, if it is kept."""
        if self._config_of(modality).image.cache:
            expert = self.experts("before", [modality])[modality]
            for split in ("train", "val", "test"):
                if shard_paths(self.dataset.root, modality, split):
                    self._one_pass(expert, split, 1)

    def _training_batches(
        self, experts: dict[str, Expert], settings: TrainConfig, placement: Placement
    ) -> dict[str, Loader | FeatureLoader]:
        """Endless batches of each modality: this rank's part of them."""
        found = {m: self._training(e, settings, placement) for m, e in experts.items()}
        for modality, loader in found.items():
            if loader.batch_size > loader.num_samples:
                log.warning(
                    "%s: a batch of %d samples, of which there are %d: copies are not contrasted "
                    "with each other, and cost the same; lower batch_size",
                    modality,
                    loader.batch_size,
                    loader.num_samples,
                )
        meet_after("image features")
        return found

    def _check_batches(self, settings: TrainConfig, placement: Placement, *, frozen: bool) -> None:
        """Refuse batches that the ranks cannot share, before anything is computed for them."""
        unknown = sorted(settings.batch_sizes.keys() - set(self.modalities))
        if unknown:
            raise M3BindError(
                f"batch_sizes.{unknown[0]}: this run has no such modality, only "
                f"{', '.join(self.modalities)}"
            )
        for modality, owners in placement.owners.items():
            batch, ranks = settings.batch_of(modality), len(owners)
            if batch < ranks:
                raise M3BindError(
                    f"a batch of {batch} samples of {modality} is less than one for each of "
                    f"{ranks} ranks: raise batch_size, or start fewer"
                )
            image = self._config_of(modality).image
            if batch % ranks and not (image.cache and (frozen or image.freeze)):
                raise M3BindError(
                    f"a batch of {batch} samples of {modality} does not divide by {ranks} ranks, "
                    "each of which streams an equal part of the images: some would be seen more "
                    "often than others; choose a multiple, or image.cache=true"
                )

    def _training(
        self, expert: Expert, settings: TrainConfig, placement: Placement
    ) -> Loader | FeatureLoader:
        batch = settings.batch_of(expert.modality)
        part = placement.share(batch)
        if self._keeps_features(expert):
            features = self._features(expert, "train", placement)
            return FeatureLoader(features, batch, train=True, seed=self.config.seed, part=part)
        return self._images(
            expert, "train", part.stop - part.start, train=True, settings=settings,
            shard_id=placement.rank, num_shards=placement.size,
        )  # fmt: skip

    def _one_pass(
        self, expert: Expert, split: str, batch_size: int, placement: Placement | None = None
    ) -> Loader | FeatureLoader:
        """A split in order, all of it on every rank."""
        if self._keeps_features(expert):
            return FeatureLoader(self._features(expert, split, placement), batch_size, train=False)
        return self._images(expert, split, _few(expert), train=False)

    def _keeps_features(self, expert: Expert) -> bool:
        return expert.image.frozen and self._config_of(expert.modality).image.cache

    def _images(
        self, expert: Expert, split: str, batch_size: int, *, train: bool,
        settings: TrainConfig | None = None, shard_id: int = 0, num_shards: int = 1,
    ) -> Loader:  # fmt: skip
        settings = settings or self.config.pretrain
        return Loader(
            self.dataset.root, expert.modality, split, expert.preprocess, batch_size,
            train=train, seed=self.config.seed, num_threads=settings.num_threads,
            prefetch=settings.prefetch, shard_id=shard_id, num_shards=num_shards,
            device_id=self.device.index if self.device.type == "cuda" else None,
        )  # fmt: skip

    def _features(self, expert: Expert, split: str, placement: Placement | None) -> Features:
        """What a frozen trunk gives for a split: read, or computed and kept."""
        images = self._images(expert, split, _few(expert), train=False)
        path = self.folder / "features" / f"{expert.modality}-{split}.safetensors"
        fingerprint = f"{expert.image.fingerprint()}/{images.content()}"
        ranks = placement.owners[expert.modality] if placement else ()
        with first_before_others(path.name, ranks):
            found = Features.load(path, expert.modality, fingerprint)
            if found is None:
                found = Features.compute(
                    progress_bar(images, desc=f"{expert.modality}, {split}: image features"),
                    lambda batch: expert.eval().image_features(batch.to(self.device)),
                    fingerprint,
                )
                found.save(path)
        return found

    def _texts(self, modalities: Iterable[str]) -> list[str]:
        """Every section and every whole report of these training splits, as often as it occurs."""
        found = []
        for modality in modalities:
            for report in iter_reports(self.dataset.root, modality, "train"):
                parts = sections(report)
                found += [text for text in (parts.findings, parts.impression, parts.whole) if text]
        return found

    def _prepare_texts(
        self, experts: dict[str, Expert], placement: Placement | None = None
    ) -> None:
        """Where a text tower keeps the hidden states of its frozen layers, compute those of every
        text that training, validation and test will ask for, or read them from ``text_cache`` if
        an earlier stage of a run in this folder computed them.
        """
        caches = {c.fingerprint: c for e in experts.values() if (c := _cache_of(e)) is not None}
        needed = gathered_objects(sorted(caches))
        for name, cache in sorted(caches.items()):
            ranks = [rank for rank, names in enumerate(needed) if name in names]
            # Of all modalities: in stage 1 every expert reads the texts of the others.
            for modality in placement.modalities if placement else experts:
                path = self.folder / "text_cache" / f"{modality}-{cache.fingerprint}.safetensors"
                wanted = {*self._texts([modality]), *self._evaluation_texts(modality)}
                with first_before_others(path.name, ranks):
                    cache.load(path)
                    if any(text not in cache for text in wanted):
                        bar = partial(progress_bar, desc=f"{modality}: frozen text layers")
                        cache.precompute(wanted, self.device, bar)
                        cache.save(path, wanted)
        meet_after("frozen text layers")

    def _evaluation_texts(self, modality: str) -> set[str]:
        root = self.dataset.root
        prompts = self.dataset.modalities[modality].prompts.values()
        texts = {text for classes in prompts for one in classes.values() for text in one}
        for split in ("val", "test"):
            texts |= {sections(report).whole for report in iter_reports(root, modality, split)}
        return texts

    def _embedders(
        self, experts: dict[str, Expert], split: str, placement: Placement | None = None
    ) -> list[SplitEmbedder]:
        return [
            SplitEmbedder(
                expert,
                split,
                self._one_pass(expert, split, 64, placement),
                self.dataset.modalities[modality].prompts,
            )
            for modality, expert in experts.items()
            if shard_paths(self.dataset.root, modality, split)
        ]

    def _validation(
        self,
        experts: dict[str, Expert],
        scores: tuple[str, ...],
        placement: Placement,
        text: TextEncoder | None = None,
    ) -> Validation | None:
        """None, so that the last weights count, where there is no labelled validation split."""
        if not all(shard_paths(self.dataset.root, m, "val") for m in placement.modalities):
            log.warning("no validation split for every modality: the last weights will be kept")
            return None
        embedders = self._embedders(experts, "val", placement)
        return Validation(embedders, scores, text, seed=self.config.seed, placement=placement)


def _few(expert: Expert) -> int:
    """Samples at a time in one pass: CTs at their own resolution take gigabytes."""
    return 8 if expert.preprocess.kind == "volume" else 64


def _cache_of(expert: Expert) -> HiddenCache | None:
    tower = expert.text.tower
    return tower.cache if isinstance(tower, MiniLM) and tower.cached else None
