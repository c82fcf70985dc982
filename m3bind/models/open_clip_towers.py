"""Towers of open_clip models, by name with local weights or out of an exported folder."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3bind.config import ImageTowerConfig, LoraConfig, TextTowerConfig
from m3bind.data.preprocess import Preprocess
from m3bind.models.image import ImageTower
from m3bind.models.lora import add_lora
from m3bind.models.text import TextTower, freeze_upstream

FITS = {"shortest": "crop", "longest": "pad", "squash": "stretch"}


def load_model(name: str, weights: str | None, **options: Any) -> tuple[Any, bool]:
    """An open_clip model and whether its weights were loaded; never downloads.

    ``name`` is a built-in name, whose ``weights`` are a local file (None: random), or a folder
    with ``open_clip_config.json`` and its weights. Raises ValueError for what does not fit.
    """
    import open_clip

    if weights is not None and not os.path.isfile(weights):
        raise ValueError(f"no open_clip weights at {weights}: give the path of a local file")
    folder = Path(name)
    if folder.is_dir():
        if weights is not None:
            raise ValueError(f"{name} is a folder with its own weights: leave weights out")
        found = open_clip.factory._find_checkpoint_in_dir(folder)
        model_name, loaded = f"local-dir:{name}", found is not None
    elif name in open_clip.list_models():
        model_name, loaded = name, weights is not None
    else:
        raise ValueError(f"open_clip:{name} is neither a folder nor a model that open_clip lists")
    try:
        # The custom text form keeps the text tower in one module, whatever the architecture.
        model = open_clip.create_model(
            model_name,
            pretrained=weights,
            pretrained_text=False,
            force_custom_text=True,
            weights_only=True,
            **options,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())  # torch lists keys on lines of their own
        raise ValueError(f"open_clip:{name} does not load (weights {weights}): {reason}") from None
    return model, loaded


class OpenClipImage(ImageTower):
    """``visual`` of an open_clip model, its own projection included."""

    def __init__(self, name: str, config: ImageTowerConfig, lora: LoraConfig | None) -> None:
        options = dict(config.options)
        if config.size is not None:
            square = len(set(config.size)) == 1  # a ResNet of open_clip takes no tuple
            options["force_image_size"] = config.size[0] if square else tuple(config.size)
        model, loaded = load_model(name, config.weights, **options)
        cfg = dict(model.visual.preprocess_cfg)
        size = cfg["size"] if not isinstance(cfg["size"], int) else (cfg["size"],) * 2
        fit = FITS[cfg["resize_mode"]]
        preprocess = Preprocess(
            kind="image2d",
            size=tuple(size),
            channels=3,
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
            interpolation="bicubic" if cfg["interpolation"] == "bicubic" else "linear",
            fit=fit,
        )
        super().__init__(preprocess, _embed_dim(model))
        self.trunk = model.visual
        self.initial_scale = _initial_scale(model)
        self.adapt(config, lora, tower=f"the image tower of open_clip:{name}", loaded=loaded)

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images)
        return features[0] if isinstance(features, tuple) else features  # CoCa adds tokens


class OpenClipText(TextTower):
    """``text`` of an open_clip model, with the tokenizer that its configuration names."""

    def __init__(self, name: str, config: TextTowerConfig, lora: LoraConfig | None) -> None:
        super().__init__()
        import open_clip

        model, loaded = load_model(name, config.weights)
        self.trunk: nn.Module = model.text
        source = f"local-dir:{name}" if Path(name).is_dir() else name
        self.tokenizer: Any = open_clip.get_tokenizer(source)
        self.width = _embed_dim(model)
        if config.train_layers == 0:
            self.requires_grad_(False)
        elif lora is not None:
            add_lora(self.trunk, lora, tower=f"the text tower of open_clip:{name}")
        self.upstream = freeze_upstream(self, loaded=loaded)

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        return [row[row != 0].tolist() for row in self.tokenizer(texts)]

    def forward(self, texts: list[str], device: torch.device) -> Tensor:
        features = self.trunk(self.tokenizer(texts).to(device))
        return features[0] if isinstance(features, tuple) else features


def _embed_dim(model: Any) -> int:
    dim = getattr(model.visual, "output_dim", None) or getattr(model.text, "output_dim", None)
    if not isinstance(dim, int):
        raise ValueError("this open_clip model does not tell the width of its embeddings")
    return dim


def _initial_scale(model: Any) -> float:
    return float(model.logit_scale.detach().reshape(-1)[0])
