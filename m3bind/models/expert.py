"""An expert: one modality's image tower and text tower in one embedding space."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from m3bind.config import ExpertConfig, LoraConfig, TextTowerConfig
from m3bind.data.preprocess import Preprocess
from m3bind.models.heads import Head, derive_seed, seeded
from m3bind.models.image import ImageTower, build_image_tower
from m3bind.models.text import TextEncoder, build_text_tower, load_own_state, own_state

INITIAL_SCALE = math.log(1 / 0.07)
LARGEST_SCALE = math.log(100)


class Expert(nn.Module):
    """A CLIP-like image-text model of one modality, with heads into the shared width.

    ``logit_scale`` is the logarithm of the scale, shape [1], kept in [0, ln 100] by `scale`.
    """

    def __init__(
        self, modality: str, image: ImageTower, image_head: Head, text: TextEncoder
    ) -> None:
        super().__init__()
        self.modality = modality
        self.image, self.image_head, self.text = image, image_head, text
        self.built: dict[str, Any] = {}  # what `build_expert` was given, in plain values
        initial = INITIAL_SCALE if image.initial_scale is None else image.initial_scale
        self.logit_scale = nn.Parameter(torch.tensor([initial]))

    @property
    def preprocess(self) -> Preprocess:
        return self.image.preprocess

    @property
    def width(self) -> int:
        """The shared width."""
        return self.image_head.weight.shape[0]

    def scale(self) -> Tensor:
        """The scale of the similarities, exp(logit_scale), shape [1]."""
        self.keep_in_bounds()
        return self.logit_scale.exp()

    @torch.no_grad()
    def keep_in_bounds(self) -> None:
        """After a step of the optimizer. In place: a clamp in the graph would stop the gradient."""
        self.logit_scale.clamp_(0.0, LARGEST_SCALE)

    def image_features(self, images: Tensor) -> Tensor:
        """Features of the trunk [B, trunk width], without a graph where the trunk is frozen.

        What has two axes are features already, as a cache of a frozen trunk hands them out.
        """
        if images.ndim == 2:
            return images
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.image.frozen):
            return self.image(images)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit-norm embeddings [B, width], float32, of preprocessed images."""
        return self.image_head(self.image_features(images))

    def encode_text(self, texts: list[str]) -> Tensor:
        """Unit-norm embeddings [B, width], float32, of raw strings."""
        return self.text.encode_text(texts)

    def freeze_trunk(self) -> None:
        """Freeze the image trunk, except where low-rank adapters train it; the head trains."""
        if not self.image.adapted:
            self.image.freeze()

    def trainable_state(self) -> dict[str, Tensor]:
        """The state dict without what the upstream files hold already."""
        upstream = {f"image.{name}" for name in self.image.upstream}
        upstream |= {f"text.tower.{name}" for name in self.text.tower.upstream}
        return own_state(self, upstream)

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trainable_state`; raises ValueError for keys that do not fit."""
        load_own_state(self, state, self.trainable_state())


def build_expert(
    config: ExpertConfig,
    modality: str,
    *,
    width: int = 256,
    seed: int = 0,
    kind: str | None = None,
) -> Expert:
    """Build one expert, the same for the same arguments on every machine.

    ``config.seed`` None derives the expert's own seed from ``seed`` and ``modality``, so that
    no two experts start from the same head. ``kind`` is needed for a modality of your own.
    """
    own = config.seed if config.seed is not None else derive_seed(seed, modality)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own)
        image = build_image_tower(config.image, config.lora, modality, kind)
        tower = build_text_tower(config.text, config.lora)
    # A pre-trained pair is aligned already, and one start for both heads keeps it so.
    paired = config.image.source == config.text.source and image.width == tower.width
    hidden = config.head_hidden
    image_head = Head(image.width, width, seeded(own, "head" if paired else "image head"), hidden)
    text_head = Head(tower.width, width, seeded(own, "head" if paired else "text head"), hidden)
    if not paired:
        image.initial_scale = None
    expert = Expert(modality, image, image_head, TextEncoder(tower, text_head))
    expert.built = {"modality": modality, "kind": kind, "width": width, "seed": seed}
    expert.built["expert"] = dataclasses.asdict(config)
    return expert


def build_text_encoder(
    config: TextTowerConfig,
    lora: LoraConfig | None,
    *,
    width: int = 256,
    seed: int = 0,
    head_hidden: int = 0,
) -> TextEncoder:
    """Build a text encoder alone, as stage 2 trains one."""
    own = derive_seed(seed, "shared text encoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own)
        tower = build_text_tower(config, lora)
    encoder = TextEncoder(tower, Head(tower.width, width, seeded(own, "text head"), head_hidden))
    encoder.built = {
        "text": dataclasses.asdict(config),
        "lora": None if lora is None else dataclasses.asdict(lora),
        "head_hidden": head_hidden,
        "width": width,
        "seed": seed,
    }
    return encoder
