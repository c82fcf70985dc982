"""What every image tower offers, and how one is chosen by its source."""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from m3bind.config import ImageTowerConfig, LoraConfig
from m3bind.data.constants import KIND
from m3bind.data.preprocess import Preprocess
from m3bind.models.lora import add_lora
from m3bind.models.text import freeze_upstream


class ImageTower(nn.Module):
    """Preprocessed images, volumes or signals to features [B, ``width``].

    ``upstream`` as in `TextTower`. A tower is trained in full, or frozen, or adapted: frozen
    with low-rank adapters. Batch statistics of a frozen or adapted tower stay as they are.
    """

    def __init__(self, preprocess: Preprocess, width: int) -> None:
        super().__init__()
        self.preprocess, self.width = preprocess, width
        self.upstream: set[str] = set()
        self.adapted = self.frozen = False
        self.initial_scale: float | None = None  # log scale of a pre-trained pair

    def adapt(
        self, config: ImageTowerConfig, lora: LoraConfig | None, *, tower: str, loaded: bool
    ) -> None:
        """Freeze or adapt the trunk as configured; to be called at the end of ``__init__``."""
        if config.freeze:
            self.freeze()
        elif lora is not None:
            add_lora(self, lora, tower=tower)
            self.adapted = True
        # In full training the statistics of batch norm change too: then nothing is upstream's.
        self.upstream = freeze_upstream(self, loaded=loaded and (self.frozen or self.adapted))

    def freeze(self) -> None:
        """Keep every parameter and statistic as it is from now on."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ImageTower":
        super().train(mode and not self.frozen)
        if self.adapted:
            for part in self.modules():
                if isinstance(part, _BatchNorm):
                    part.eval()
        return self

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any weight or with the preprocessing."""
        digest = hashlib.sha256(self.preprocess.fingerprint().encode())
        for name, tensor in self.state_dict().items():
            values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(name.encode() + values.numpy().tobytes())
        return digest.hexdigest()[:16]

    def forward(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class SmallImage(ImageTower):
    """A small convolution tower of `m3bind.models.small`; it has no attention to adapt."""

    def __init__(self, config: ImageTowerConfig, preprocess: Preprocess) -> None:
        from m3bind.models.small import SmallTower

        if config.weights is not None or config.options:
            raise ValueError("image.source 'small' takes neither weights nor options")
        trunk = SmallTower(preprocess.kind, preprocess.channels)
        super().__init__(preprocess, trunk.width)
        self.trunk = trunk
        self.adapt(config, None, tower="the small tower", loaded=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(images)


def build_image_tower(
    config: ImageTowerConfig,
    lora: LoraConfig | None,
    modality: str,
    kind: str | None = None,
) -> ImageTower:
    """Build ``small``, ``timm:<name>``, ``open_clip:<name or folder>`` or ``hf:<folder>``.

    Raises ValueError for a source that is none of these, for a two-dimensional tower on a
    modality that is not two-dimensional, and for weights that do not fit.
    """
    family, _, name = config.source.partition(":")
    if config.source == "small":
        size = tuple(config.size) if config.size else None
        return SmallImage(config, Preprocess.for_modality(modality, kind, size))
    kind = kind or KIND.get(modality)
    if family in ("timm", "open_clip", "hf") and name:
        if kind not in (None, "image2d"):
            raise ValueError(
                f"image.source {config.source!r} takes 2-D images, but {modality} is a {kind}: "
                "use 'small'"
            )
        if family == "timm":
            from m3bind.models.timm_towers import TimmImage

            return TimmImage(name, config, lora)
        if family == "open_clip":
            from m3bind.models.open_clip_towers import OpenClipImage

            return OpenClipImage(name, config, lora)
        from m3bind.models.hf_towers import HfImage

        return HfImage(name, config, lora)
    raise ValueError(
        f"image.source {config.source!r} is not known: use small, timm:<name>, "
        "open_clip:<name or folder> or hf:<folder>"
    )
