"""Pre-training: one modality's images against sections of their reports."""

import random

from torch import Tensor

from m3bind.distributed import clip_loss
from m3bind.models.expert import Expert
from m3bind.tasks.common import Batches, Losses, Report, Task, copies, draw_key, draw_sections, take


class Pretrain(Task):
    """Trains one expert: towers as configured, both heads, and the scale."""

    def __init__(self, expert: Expert) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, batches: Batches, rng: random.Random) -> tuple[Losses, Report]:
        take(batches, [self.expert.modality])
        batch = batches[self.expert.modality]
        texts = draw_sections(batch.reports, draw_key(rng), self.expert.modality)
        scale = self.expert.scale()
        image = self.expert.encode_image(batch.images)
        text = self.expert.encode_text(texts)
        loss = clip_loss(image, text, scale, mask_ids=copies(batch))
        assert isinstance(loss, Tensor)
        return {"clip": loss}, {"scale": float(scale.detach())}

    def trainable_state(self) -> dict[str, Tensor]:
        return self.expert.trainable_state()

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        self.expert.load_trainable_state(state)
