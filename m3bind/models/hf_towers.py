"""Towers of Hugging Face models in local folders: CLIP-like pairs, or a text encoder alone."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3bind.config import ImageTowerConfig, LoraConfig, TextTowerConfig
from m3bind.data.preprocess import Preprocess
from m3bind.models.image import ImageTower
from m3bind.models.lora import add_lora
from m3bind.models.text import TextTower, freeze_upstream

BICUBIC = 3  # PIL's number, as preprocessor_config.json writes it


def load_model(folder: str, weights: str | None) -> Any:
    """The model of a local folder. Raises ValueError for keys that are missing or unexpected."""
    from transformers import AutoModel

    if weights is not None:
        raise ValueError(f"hf:{folder} has its weights in the folder: leave weights out")
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"hf:{folder}: no config.json there: give a folder on this machine")
    try:
        model, info = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, weights_only=True
        )
    except OSError as error:
        raise ValueError(f"hf:{folder}: {str(error).splitlines()[0]}") from None
    # An encoder's own pooling layer is often not saved, and is not used here.
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("pooler."))
    unexpected = sorted(k for k in info["unexpected_keys"] if "embeddings.position_ids" not in k)
    if missing or unexpected or info.get("mismatched_keys"):
        raise ValueError(
            f"hf:{folder} does not fit its config.json: missing {missing[:8]}, unexpected "
            f"{unexpected[:8]}, other shapes {list(info.get('mismatched_keys') or [])[:8]}"
        )
    return model


def read_preprocess(folder: str, size: list[int] | None) -> Preprocess:
    """The preprocessing that ``preprocessor_config.json`` states; never a guess."""
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        raise ValueError(f"no {path}: the weights are of no use without their preprocessing")
    config = json.loads(path.read_text())

    def pair(value: Any) -> tuple[int, int]:
        if isinstance(value, int):
            return value, value
        if "shortest_edge" in value:
            return value["shortest_edge"], value["shortest_edge"]
        return value["height"], value["width"]

    crops = bool(config.get("do_center_crop", False))
    wanted = tuple(size) if size else pair(config["crop_size"] if crops else config["size"])
    resize = config["size"] if isinstance(config["size"], dict) else {}
    shortest = resize.get("shortest_edge")
    return Preprocess(
        kind="image2d",
        size=wanted,
        channels=3,
        mean=tuple(config["image_mean"]),
        std=tuple(config["image_std"]),
        interpolation="bicubic" if config.get("resample") == BICUBIC else "linear",
        fit="crop" if crops or shortest else "stretch",
        resize=shortest if crops and shortest and shortest > max(wanted) else None,
    )


class HfImage(ImageTower):
    """Image features of a CLIP-like folder, its projection included."""

    def __init__(self, folder: str, config: ImageTowerConfig, lora: LoraConfig | None) -> None:
        model = load_model(folder, config.weights)
        if not hasattr(model, "get_image_features"):
            raise ValueError(f"hf:{folder} is a {type(model).__name__}, which has no image tower")
        super().__init__(read_preprocess(folder, config.size), _width(model, "vision_config"))
        _keep(model, "vision")
        self.trunk = model
        if hasattr(model, "logit_scale"):
            self.initial_scale = float(model.logit_scale.detach().reshape(-1)[0])
            del model.logit_scale
        self.adapt(config, lora, tower=f"the image tower of hf:{folder}", loaded=True)

    def forward(self, images: Tensor) -> Tensor:
        return _pooled(self.trunk.get_image_features(pixel_values=images))


class HfText(TextTower):
    """Text features of a CLIP-like folder, or the mean over the tokens of a text encoder."""

    def __init__(self, folder: str, config: TextTowerConfig, lora: LoraConfig | None) -> None:
        super().__init__()
        from transformers import AutoTokenizer

        model = load_model(folder, config.weights)
        self.paired = hasattr(model, "get_text_features")
        self.width = _width(model, "text_config")
        if self.paired:
            _keep(model, "text")
        for unused in ("logit_scale", "pooler"):
            if getattr(model, unused, None) is not None:
                setattr(model, unused, None)
        self.trunk: Any = model
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text_config = getattr(model.config, "text_config", model.config)
        limit = getattr(text_config, "max_position_embeddings", config.max_tokens)
        self.max_tokens = min(config.max_tokens, limit)
        if config.train_layers == 0:
            self.requires_grad_(False)
        elif lora is not None:
            add_lora(self.trunk, lora, tower=f"the text tower of hf:{folder}")
        self.upstream = freeze_upstream(self, loaded=True)

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]

    def forward(self, texts: list[str], device: torch.device) -> Tensor:
        tokens = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_tokens,
            padding="longest",
            return_tensors="pt",
        ).to(device)
        chosen = {k: tokens[k] for k in ("input_ids", "attention_mask")}
        if self.paired:
            return _pooled(self.trunk.get_text_features(**chosen))
        hidden = self.trunk(**chosen).last_hidden_state.float()
        mask = chosen["attention_mask"][:, :, None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def _width(model: Any, part: str) -> int:
    width = getattr(model.config, "projection_dim", None)
    if width is None:
        width = getattr(model.config, part, model.config).hidden_size
    return int(width)


def _keep(model: Any, part: str) -> None:
    """Drop the other half of a pair, so that it is neither held nor adapted."""
    for name in ("vision_model", "visual_projection", "text_model", "text_projection"):
        if name.startswith(("visual", "vision")) != (part == "vision") and hasattr(model, name):
            delattr(model, name)
