"""Stage 2: one text encoder learns the text spaces of all experts."""

import random

import torch
from torch import Tensor, nn

from m3bind.config import DistillConfig
from m3bind.distributed import clip_loss, mean, similarity_distill
from m3bind.models.expert import Expert
from m3bind.models.text import TextEncoder
from m3bind.parallel import Placement, size
from m3bind.tasks.common import Batches, Losses, Report, Task, copies, draw_key, draw_sections, take


class Distill(Task):
    """Trains ``student`` alone; the experts, heads included, are frozen.

    For the texts of each modality: the cosine to its expert's embedding of the same text, CLIP's
    loss with its expert's images, and KL(expert || student) of each text's distribution over
    these images, each a mean over the modalities. Experts that were not aligned
    make the control "stage 2 without stage 1". Over ranks every one trains the student;
    ``placement`` says which have which experts (None: every rank all).
    """

    def __init__(
        self,
        student: TextEncoder,
        experts: dict[str, Expert],
        config: DistillConfig,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        widths = {m: e.width for m, e in experts.items()}
        if set(widths.values()) != {student.head.weight.shape[0]}:
            raise ValueError(
                f"the student is {student.head.weight.shape[0]} wide, the experts {widths}: "
                "build all of them with the same width"
            )
        self.student, self.config = student, config
        self.placement = placement or Placement.of(list(experts))
        for expert in experts.values():
            expert.requires_grad_(False).eval()
        # A module's parts are the same on all ranks: experts that only one has are none of it.
        if len(experts) == len(self.placement.modalities):
            self.teachers = nn.ModuleDict(experts)
        self.experts = experts

    def train(self, mode: bool = True) -> "Distill":
        super().train(mode)
        for expert in self.experts.values():
            expert.eval()
        return self

    def forward(self, batches: Batches, rng: random.Random) -> tuple[Losses, Report]:
        take(batches, self.experts)
        key, group = draw_key(rng), self.placement.group
        drawn = {m: draw_sections(batches[m].reports, key, m, group) for m in self.experts}
        # One pass for all: the student does not know which modality a text belongs to.
        embedded = self.student.encode_text([t for texts in drawn.values() for t in texts])
        parts = embedded.split([len(texts) for texts in drawn.values()])
        terms: dict[str, list[Tensor]] = {"cosine": [], "contrast": [], "similarity": []}
        report: Report = {}
        for (modality, texts), student in zip(drawn.items(), parts, strict=True):
            expert = self.experts[modality]
            with torch.no_grad():
                teacher = expert.encode_text(texts)
                image = expert.encode_image(batches[modality].images)
                scale = expert.scale()
            cosine = mean((student * teacher).sum(1), group)
            report[f"cosine/{modality}"] = float(cosine.detach())
            terms["cosine"].append(1 - cosine)
            if self.config.contrast_weight > 0:
                ids = copies(batches[modality], group)
                contrast = clip_loss(image, student, scale, mask_ids=ids, group=group)
                assert isinstance(contrast, Tensor)
                terms["contrast"].append(contrast)
            if self.config.similarity_weight > 0:
                divergence = similarity_distill(
                    student, image, scale, teacher, image, scale, directions="rows", group=group
                )
                assert isinstance(divergence, Tensor)
                terms["similarity"].append(divergence)
        weights = {
            "cosine": self.config.cosine_weight,
            "contrast": self.config.contrast_weight,
            "similarity": self.config.similarity_weight,
        }
        # The student's gradient is the mean over all ranks, a term's that over its own group.
        share = size() / self.placement.size / len(self.placement.modalities)
        losses = {n: weights[n] * share * torch.stack(v).sum() for n, v in terms.items() if v}
        return losses, report

    def trainable_state(self) -> dict[str, Tensor]:
        return self.student.trainable_state()

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        self.student.load_trainable_state(state)
