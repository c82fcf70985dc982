"""Stage 1: every expert's own loss, plus the agreement of all experts on centre texts."""

import copy
import hashlib
import itertools
import logging
import math
import random

import torch
from torch import Tensor, nn

from m3bind import distributed
from m3bind.config import AGREEMENTS, AlignConfig
from m3bind.models.expert import Expert
from m3bind.ops import clip_loss, similarity_distill
from m3bind.parallel import Placement, exchange, gathered_objects, squared_norm
from m3bind.tasks.common import (
    Batches,
    Losses,
    Report,
    Task,
    copies,
    draw_key,
    draw_sections,
    prefixed,
    take,
    without_prefix,
)

log = logging.getLogger(__name__)
AGREEMENT_SCALE = 1 / 0.07  # of infonce and relational
RATIO_EVERY = 20  # steps between two measurements of the gradients
WEAKEST_RATIO = 0.01


def agreement_loss(
    a: Tensor,  # [N, D], unit norm
    b: Tensor,  # [N, D], unit norm
    kind: str,
    text_ids: Tensor | None = None,  # [N] int64
) -> Tensor:
    """How far two experts' embeddings of the same texts are apart.

    Equivalent to::

        mse:     ((a - b) ** 2).sum(1).mean()      # 2 - 2 cos: summed over features, since a
                                                   # mean over them is D times too weak
        cosine:  (1 - (a * b).sum(1)).mean()
        infonce: clip_loss(a, b, 1 / 0.07)         # the same text is the only positive
        relational: (KL(p || q) + KL(q || p)) / 2  # mean over the texts: p and q are softmaxes of
                                                   # a text's similarities to all others, of a and
                                                   # of b, and each divergence moves the latter

    Texts of equal ``text_ids`` (none are by default) say the same: they are not each other's
    negatives, and have no part in each other's distribution. Raises ValueError for another
    ``kind``.
    """
    if text_ids is None:
        text_ids = torch.arange(len(a), device=a.device)
    if kind == "mse":
        return (a - b).square().sum(1).mean()
    if kind == "cosine":
        return (1 - (a * b).sum(1)).mean()
    if kind == "infonce":
        loss = clip_loss(a, b, AGREEMENT_SCALE, mask_ids=text_ids)
        assert isinstance(loss, Tensor)
        return loss
    if kind == "relational":
        # A sum: a text that has no other beside it counts as agreed upon, not as nothing. Rows
        # alone, since similarities among themselves are symmetric.
        total = a.new_zeros(())
        for student, teacher in ((b, a), (a, b)):
            divergence = similarity_distill(
                student, student, AGREEMENT_SCALE, teacher, teacher, AGREEMENT_SCALE,
                mask_ids=text_ids, directions="rows", reduction="sum",
            )  # fmt: skip
            assert isinstance(divergence, Tensor)
            total = total + divergence
        return total / (2 * len(a))
    raise ValueError(f"agreement {kind!r} is not one of {', '.join(AGREEMENTS)}")


def equal_texts(texts: list[str]) -> Tensor:
    """One id a text, the same where only case and spacing differ, which most towers do not see."""
    ids: dict[str, int] = {}
    return torch.tensor([ids.setdefault(" ".join(t.lower().split()), len(ids)) for t in texts])


class Align(Task):
    """Makes the experts' text spaces agree while each keeps its own image-text alignment.

    Image trunks are frozen, or trained through their low-rank adapters; all heads train. In
    each step ``centre_batch`` texts are drawn from ``centre_texts`` (raw strings, of all
    modalities), every expert tokenises and embeds them itself, and the agreement is summed
    over all pairs of experts. The report tells the norm of the agreement's gradient over that
    of the experts' own losses, both at the text heads, every 20 batches. With a
    ``preserve_weight``, KL(original || now) of each expert's image-text distributions, the mean of
    both directions, is added.

    Over ranks ``experts`` are those that ``placement`` gives this one (None: all). The ranks of an
    expert share its batch and the embedding of the centre texts, and all ranks see what all
    experts make of these.

    Raises ValueError for fewer than two experts, two experts with one and the same head, or
    no centre texts.
    """

    calls: Tensor

    def __init__(
        self,
        experts: dict[str, Expert],
        centre_texts: list[str],
        config: AlignConfig,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self.placement = placement or Placement.of(list(experts))
        if len(self.placement.modalities) < 2:
            raise ValueError(f"stage 1 needs at least two experts, found {sorted(experts)}")
        _check_heads(experts, self.placement)
        # Repetitions stay: an impression that many reports share is drawn as often as they occur,
        # and what names a condition is what binds.
        self.centre_texts = [text.strip() for text in centre_texts if text.strip()]
        if not self.centre_texts:
            raise ValueError("stage 1 needs centre texts: every report given is empty")
        self.config = config
        for expert in experts.values():
            expert.freeze_trunk()
        self.originals = {}
        if config.preserve_weight > 0:
            self.originals = {m: copy.deepcopy(e).eval() for m, e in experts.items()}
        self.experts = nn.ModuleDict(experts)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, batches: Batches, rng: random.Random) -> tuple[Losses, Report]:
        take(batches, self.experts)
        count = min(self.config.centre_batch, len(self.centre_texts))
        centre = list(dict.fromkeys(rng.sample(self.centre_texts, count)))
        own_centre = centre[self.placement.share(len(centre))]
        key, group = draw_key(rng), self.placement.group
        losses: Losses = {}
        report: Report = {}
        own_centres, preserved = {}, []
        for modality, expert in self._experts():
            batch = batches[modality]
            texts = draw_sections(batch.reports, key, modality, group)
            both = expert.encode_text(texts + own_centre)  # one pass through the tower
            text, own_centres[modality] = both[: len(texts)], both[len(texts) :]
            image = expert.encode_image(batch.images)
            scale = expert.scale()
            report[f"scale/{modality}"] = float(scale.detach())
            ids = copies(batch, group)
            clip = distributed.clip_loss(image, text, scale, mask_ids=ids, group=group)
            assert isinstance(clip, Tensor)
            losses[f"clip/{modality}"] = clip
            if self.originals:
                with torch.no_grad():
                    original = self.originals[modality].to(image.device)
                    old = (
                        original.encode_image(batch.images),
                        original.encode_text(texts),
                        original.scale(),
                    )
                kept = distributed.similarity_distill(image, text, scale, *old, group=group)
                assert isinstance(kept, Tensor)
                preserved.append(kept)
        centres = exchange(own_centres, len(centre), self.placement)
        pairs = list(itertools.combinations(centres.values(), 2))
        text_ids = equal_texts(centre).to(pairs[0][0].device)
        agreement = torch.stack(
            [agreement_loss(a, b, self.config.agreement, text_ids) for a, b in pairs]
        ).sum()
        with torch.no_grad():
            cosines = [(a * b).sum(1).mean() for a, b in pairs]
            report["centre_cosine"] = float(torch.stack(cosines).mean())
        own = torch.stack(list(losses.values())).sum()
        losses["agreement"] = self.config.agreement_weight * agreement
        if preserved:
            for modality, kept in zip(own_centres, preserved, strict=True):
                losses[f"preserve/{modality}"] = self.config.preserve_weight * kept
        if torch.is_grad_enabled() and self.config.agreement_weight > 0:
            if int(self.calls) % RATIO_EVERY == 0:
                report["gradient_ratio"] = self._gradient_ratio(losses["agreement"], own)
            self.calls += 1
        return losses, report

    def _gradient_ratio(self, agreement: Tensor, own: Tensor) -> float:
        # At the heads, the last layers: the graph below them is not walked.
        heads = [expert.text.head.weight for _, expert in self._experts()]
        squares = []
        for loss in (agreement, own):
            gradients = torch.autograd.grad(loss, heads, retain_graph=True)
            squares.append(squared_norm(gradients, self.placement))
        ratio = math.sqrt(squares[0] / max(squares[1], 1e-24))
        if ratio < WEAKEST_RATIO:
            log.warning(
                "step %d: the gradient of the agreement is %.2g of the experts' own: nothing "
                "will be bound; raise align.agreement_weight (now %g) or centre_batch",
                int(self.calls),
                ratio,
                self.config.agreement_weight,
            )
        return ratio

    def _experts(self) -> list[tuple[str, Expert]]:
        return [(m, e) for m, e in self.experts.items() if isinstance(e, Expert)]

    def trainable_state(self) -> dict[str, Tensor]:
        state = {"calls": self.calls}
        for modality, expert in self._experts():
            state |= prefixed(modality, expert.trainable_state())
        return state

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        for modality, expert in self._experts():
            expert.load_trainable_state(without_prefix(modality, state))
        self.calls.copy_(state["calls"])


def _check_heads(experts: dict[str, Expert], placement: Placement) -> None:
    heads = {m: _digest(expert.text.head.weight) for m, expert in experts.items()}
    if len(experts) < len(placement.modalities):
        heads = {m: name for part in gathered_objects(heads) for m, name in part.items()}
    for (a, v), (b, w) in itertools.combinations(heads.items(), 2):
        if v == w:
            raise ValueError(
                f"the experts {a} and {b} have one and the same text head: they would be bound "
                "by construction; give them different seeds"
            )


def _digest(weight: Tensor) -> bytes:
    values = weight.detach().cpu().contiguous().numpy()
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).digest()
