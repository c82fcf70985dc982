"""Experts that are small enough to reckon by hand."""

from types import SimpleNamespace

import torch
from torch import Tensor

from m3bind.data.preprocess import Preprocess
from m3bind.models.expert import Expert
from m3bind.models.heads import Head, seeded
from m3bind.models.image import ImageTower
from m3bind.models.text import TextEncoder, TextTower

WIDTH = 6
REPORTS = [
    "FINDINGS: heart is large.\nIMPRESSION: heart failure.",
    "FINDINGS: lungs are clear.\nIMPRESSION: normal.",
    "FINDINGS: nodule in the lung.\nIMPRESSION: tumour.",
]


class StubText(TextTower):
    """Counts of letters, through one layer."""

    width = 26

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(26, 26)
        self.seen: list[list[str]] = []

    def forward(self, texts: list[str], device: torch.device) -> Tensor:
        self.seen.append(texts)
        counts = [[t.lower().count(chr(97 + i)) for i in range(26)] for t in texts]
        return self.layer(torch.tensor(counts, dtype=torch.float32, device=device))


class StubImage(ImageTower):
    def __init__(self) -> None:
        super().__init__(Preprocess(kind="image2d", size=(4, 4), channels=1), 16)
        self.layer = torch.nn.Linear(16, 16)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


def stub_encoder(name: str) -> TextEncoder:
    return TextEncoder(StubText(), Head(26, WIDTH, seeded(name, "text")))


def stub_expert(name: str) -> Expert:
    torch.manual_seed(sum(map(ord, name)))
    return Expert(name, StubImage(), Head(16, WIDTH, seeded(name, "image")), stub_encoder(name))


def batches(*names: str) -> dict[str, SimpleNamespace]:
    generator = torch.Generator().manual_seed(0)
    return {
        n: SimpleNamespace(
            images=torch.randn(3, 1, 4, 4, generator=generator),
            reports=REPORTS,
            meta=[{"id": str(row)} for row in range(3)],
        )
        for n in names
    }
