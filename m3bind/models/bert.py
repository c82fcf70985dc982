"""A BERT encoder in plain PyTorch that works on packed tokens, so that no padding is computed.

Parameter names are those of Hugging Face's BertModel, whose files it therefore loads. The
texts of a batch lie one behind the other in one [T, width] tensor; only attention pads them.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True, slots=True)
class BertShape:
    """The keys of a BERT ``config.json`` that fix the computation."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    max_position_embeddings: int
    type_vocab_size: int
    vocab_size: int
    layer_norm_eps: float

    @classmethod
    def read(cls, folder: Path) -> "BertShape":
        """Read ``config.json``; raises ValueError for a model that this file does not compute."""
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for key, only in (("model_type", "bert"), ("hidden_act", "gelu")):
            if config.get(key, only) != only:
                raise ValueError(f"{path}: {key} is {config[key]!r}, only {only!r} is supported")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(f"{path}: position_embedding_type must be 'absolute'")
        return cls(**{f.name: config[f.name] for f in fields(cls)})


@dataclass(slots=True)
class Packed:
    """Texts one behind the other: ``hidden`` [T, width] and ``lengths`` [B] that sum to T."""

    hidden: Tensor  # [T, width]
    lengths: Tensor  # [B], int64

    def with_hidden(self, hidden: Tensor) -> "Packed":
        return Packed(hidden, self.lengths)

    def mean(self) -> Tensor:
        """The mean over each text's tokens, [B, width]."""
        index = torch.repeat_interleave(self.lengths)
        total = self.hidden.new_zeros(len(self.lengths), self.hidden.shape[1])
        return total.index_add(0, index, self.hidden) / self.lengths[:, None]


class Layout:
    """Where each packed token stands in the padded [B, L] grid that attention needs."""

    def __init__(self, lengths: Tensor) -> None:
        self.batch, self.longest = len(lengths), int(lengths.max())
        valid = torch.arange(self.longest, device=lengths.device) < lengths[:, None]
        self.index = valid.flatten().nonzero().squeeze(1)
        self.mask = None if bool(valid.all()) else valid[:, None, None, :]

    def pad(self, x: Tensor) -> Tensor:
        grid = x.new_zeros(self.batch * self.longest, x.shape[1])
        return grid.index_copy(0, self.index, x).view(self.batch, self.longest, -1)

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.index)


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings of packed token ids."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.word_embeddings = nn.Embedding(shape.vocab_size, width)
        self.position_embeddings = nn.Embedding(shape.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(shape.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=shape.layer_norm_eps)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:  # ids [T], lengths [B]
        starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        positions = torch.arange(len(ids), device=ids.device) - starts
        embedded = self.word_embeddings(ids) + self.position_embeddings(positions)
        return self.LayerNorm(embedded + self.token_type_embeddings.weight[0])


class BertLayer(nn.Module):
    """One post-norm encoder layer, without dropout: what is trained here are low-rank adapters."""

    def __init__(self, shape: BertShape) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.intermediate_size
        self.num_heads = shape.num_attention_heads

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(width, eps=shape.layer_norm_eps)

        names = ("query", "key", "value")
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(width, width) for name in names}),
            "output": nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": norm()}),
        })  # fmt: skip
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": norm()})

    def forward(self, hidden: Tensor, layout: Layout) -> Tensor:  # hidden [T, width]
        self_attention, output = self.attention["self"], self.attention["output"]
        assert isinstance(self_attention, nn.ModuleDict) and isinstance(output, nn.ModuleDict)

        def heads(name: str) -> Tensor:  # [B, num_heads, L, width / num_heads]
            grid = layout.pad(self_attention[name](hidden))
            return grid.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads("query"), heads("key"), heads("value"), attn_mask=layout.mask
        )
        mixed = layout.pack(mixed.transpose(1, 2).flatten(2))
        hidden = output["LayerNorm"](hidden + output["dense"](mixed))
        inner = F.gelu(self.intermediate["dense"](hidden))
        return self.output["LayerNorm"](hidden + self.output["dense"](inner))
