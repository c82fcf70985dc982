"""What every text tower offers, and the text encoder that is a tower with a head."""

from typing import Any

import torch
from torch import Tensor, nn

from m3bind.config import LoraConfig, TextTowerConfig
from m3bind.models.heads import Head


class TextTower(nn.Module):
    """Raw strings to features [B, ``width``]; each tower tokenises with its own tokenizer.

    ``upstream`` are the names of the parameters that come out of files and stay as they are:
    a checkpoint of ours does not repeat them.
    """

    width: int

    def __init__(self) -> None:
        super().__init__()
        self.upstream: set[str] = set()

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, cut at the tower's limit, special tokens included."""
        raise NotImplementedError

    def forward(self, texts: list[str], device: torch.device) -> Tensor:
        raise NotImplementedError


class TextEncoder(nn.Module):
    """A text tower and its head into the shared width; the student of stage 2 is one."""

    def __init__(self, tower: TextTower, head: Head) -> None:
        super().__init__()
        self.tower, self.head = tower, head
        self.built: dict[str, Any] = {}  # what `build_text_encoder` was given, in plain values

    def encode_text(self, texts: list[str]) -> Tensor:
        """Unit-norm embeddings [B, width], float32; equal strings are computed once.

        Raises ValueError for an empty list or an empty text.
        """
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError("encode_text needs at least one text, and none that is empty")
        unique = list(dict.fromkeys(texts))
        embedded = self.head(self.tower(unique, self.head.weight.device))
        if len(unique) == len(texts):
            return embedded
        place = {text: i for i, text in enumerate(unique)}
        return embedded[torch.tensor([place[text] for text in texts], device=embedded.device)]

    def forward(self, texts: list[str]) -> Tensor:
        return self.encode_text(texts)

    def trainable_state(self) -> dict[str, Tensor]:
        """The state dict without what the upstream files hold already."""
        return own_state(self, {f"tower.{name}" for name in self.tower.upstream})

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trainable_state`; raises ValueError for keys that do not fit."""
        load_own_state(self, state, self.trainable_state())


def build_text_tower(config: TextTowerConfig, lora: LoraConfig | None) -> TextTower:
    """Build ``minilm``, ``open_clip:<name or folder>`` or ``hf:<folder>``.

    With ``lora`` adapters train, else the layers themselves. ``train_layers`` 0 freezes the
    tower; other numbers count the last layers of minilm, and mean all layers elsewhere.
    Raises ValueError for a source that is none of these, and for weights that do not fit.
    """
    family, _, name = config.source.partition(":")
    if config.source == "minilm":
        from m3bind.models.minilm import MiniLM

        return MiniLM(config, lora)
    known = family in ("open_clip", "hf") and name
    if known and (config.cache or config.frozen_bf16):
        option = "cache" if config.cache else "frozen_bf16"
        raise ValueError(f"text.{option} works for source 'minilm' only, not {config.source!r}")
    if known and family == "open_clip":
        from m3bind.models.open_clip_towers import OpenClipText

        return OpenClipText(name, config, lora)
    if known:
        from m3bind.models.hf_towers import HfText

        return HfText(name, config, lora)
    raise ValueError(
        f"text.source {config.source!r} is not known: use minilm, open_clip:<name or folder> "
        "or hf:<folder>"
    )


def own_state(module: nn.Module, upstream: set[str]) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if k not in upstream}


def load_own_state(module: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or unexpected or wrong:
        raise ValueError(
            f"the saved state does not fit this model: missing {missing[:5]}, unexpected "
            f"{unexpected[:5]}, other shapes {wrong[:5]}: build it from the configuration that "
            "the state was saved with"
        )
    module.load_state_dict(state, strict=False)


def freeze_upstream(tower: nn.Module, *, loaded: bool) -> set[str]:
    """Names in ``tower`` that files restore: the frozen parameters of loaded weights, buffers."""
    if not loaded:
        return set()
    trained = {name for name, p in tower.named_parameters() if p.requires_grad}
    return {name for name in tower.state_dict() if name not in trained}
