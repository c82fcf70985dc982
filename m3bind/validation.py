"""Scores on the validation split, by which the best weights of a training are chosen."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from m3bind.data.features import FeatureLoader
from m3bind.data.loader import Loader
from m3bind.eval.embed import embed_split
from m3bind.eval.evaluate import evaluate
from m3bind.eval.metrics import lookup
from m3bind.eval.store import EmbeddingSet
from m3bind.models.expert import Expert
from m3bind.models.text import TextEncoder
from m3bind.parallel import Placement, gathered_objects

PERMUTATIONS = 20  # enough to choose by; the test split is judged with all of them


class SplitEmbedder:
    """Embeds one split with one expert, as often as asked.

    A frozen trunk gives the same features each time: they are kept after the first pass.
    """

    def __init__(
        self,
        expert: Expert,
        split: str,
        loader: Loader | FeatureLoader,
        prompts: dict[str, dict[str, list[str]]],
    ) -> None:
        self.expert, self.split, self.loader, self.prompts = expert, split, loader, prompts
        self._batches: list[tuple[Tensor, list[str], list[dict]]] = []

    @torch.no_grad()
    def __call__(self, text: TextEncoder | None = None, *, texts: bool = True) -> EmbeddingSet:
        """Embed images and ``texts``; ``text`` is the shared encoder that reads for the expert."""
        expert, encoder = self.expert.eval(), text or self.expert
        encoder.eval()
        return embed_split(
            expert.modality, self.split, self._features(), expert.image_head,
            encoder.encode_text, self.prompts, texts=texts,
        )  # fmt: skip

    def _features(self) -> Iterable[tuple[Tensor, list[str], list[dict]]]:
        if self._batches:
            yield from self._batches
            return
        kept = []
        device = self.expert.logit_scale.device
        for batch in self.loader:
            features = self.expert.image_features(batch.images.to(device))
            kept.append((features, batch.reports, batch.meta))
            yield kept[-1]
        if self.expert.image.frozen:
            self._batches = kept


class Validation:
    """``score``: the sum of the named figures of the evaluation; each is reported beside it.

    ``scores`` are paths into the evaluation, with ``{}`` for the stage. A figure that cannot be
    measured on this split (no labels, one modality) does not count; where none can, the score is
    NaN, and `m3bind.train.fit` keeps the last weights. Where ``placement`` spreads the experts over
    ranks, each embeds with its own, and all judge all of them.
    """

    def __init__(
        self,
        embedders: list[SplitEmbedder],
        scores: tuple[str, ...],
        text: TextEncoder | None = None,
        *,
        seed: int = 0,
        placement: Placement | None = None,
    ) -> None:
        self.placement = placement
        self.embedders, self.scores, self.text, self.seed = embedders, scores, text, seed
        # The evaluation measures retrieval between images for stages that may change images.
        self.stage = "aligned" if text is None else "distilled"

    def __call__(self) -> dict[str, float]:
        sets = {e.expert.modality: e(self.text) for e in self.embedders}
        if self.placement and len(self.placement.own) < len(self.placement.modalities):
            # One rank speaks for all that hold the same expert.
            parts = gathered_objects(sets if self.placement.rank == 0 else {})
            sets = {modality: found for part in parts for modality, found in part.items()}
        found = evaluate({self.stage: sets}, seed=self.seed, num_permutations=PERMUTATIONS)
        values = {
            path.replace(".{}", ""): lookup(found, path.format(self.stage)) for path in self.scores
        }
        known = {name: float(value) for name, value in values.items() if value is not None}
        return {"score": sum(known.values()) if known else math.nan, **known}
