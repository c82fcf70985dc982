"""Adapters go where the module tree says, or nowhere with an error."""

import pytest
import torch
from torch import nn

from m3bind.config import LoraConfig
from m3bind.models.attention import SplitAttention, split_attention
from m3bind.models.lora import add_lora, discover_targets


class Attention(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(8, 8))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("query", "key", "value"), ["query", "value"]),  # BERT
        (("q_proj", "k_proj", "v_proj", "out_proj"), ["q_proj", "v_proj"]),  # HF CLIP
        (("qkv", "proj"), ["qkv"]),  # timm
        (("fc1", "fc2"), []),
    ],
)
def test_discovery(names: tuple[str, ...], expected: list[str]) -> None:
    tree = nn.Sequential(Attention(*names), nn.Linear(8, 8))
    assert discover_targets(tree) == [f"0.{name}" for name in expected]


def test_wrong_targets_fail_loudly() -> None:
    with pytest.raises(ValueError, match=r"\['q_proj'\] match nothing in a BERT.*query"):
        add_lora(Attention("query", "value"), LoraConfig(targets=["q_proj"]), tower="a BERT")
    with pytest.raises(ValueError, match="no query and value projections in a ConvNet"):
        add_lora(nn.Sequential(nn.Conv2d(3, 3, 1)), LoraConfig(), tower="a ConvNet")


def test_named_targets_are_taken_and_start_as_the_identity() -> None:
    tree = nn.Sequential(Attention("query", "value", "dense"))
    x = torch.randn(2, 8)
    before = tree[0].dense(x)
    targets = add_lora(tree, LoraConfig(targets=["dense"], dropout=0.0), tower="a tree")
    assert targets == ["0.dense"]
    assert torch.equal(tree[0].dense(x), before)
    trained = [n for n, p in tree.named_parameters() if p.requires_grad]
    assert trained == ["0.dense.lora_A.default.weight", "0.dense.lora_B.default.weight"]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "heads"])
def test_split_attention_is_multihead_attention(batch_first: bool, mask: str) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    nn.init.normal_(attention.in_proj_bias)
    hidden = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    masks = {
        "none": None,
        "bool": hidden,
        "float": torch.zeros(5, 5).masked_fill(hidden, float("-inf")),
        "heads": hidden.expand(3 * 4, 5, 5),  # batch of 3, 4 heads
    }
    x = torch.randn(3, 5, 16) if batch_first else torch.randn(5, 3, 16)
    expected = attention(x, x, x, need_weights=False, attn_mask=masks[mask])[0]
    tree = nn.ModuleDict({"attn": attention})
    split_attention(tree)
    assert isinstance(tree["attn"], SplitAttention)
    got = tree["attn"](x, x, x, need_weights=False, attn_mask=masks[mask])[0]
    assert torch.allclose(got, expected, atol=1e-6)


def test_frozen_weights_do_not_drift() -> None:
    tree = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4, batch_first=True)})
    add_lora(tree, LoraConfig(), tower="open_clip")
    for parameter in tree.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    frozen = {n: p.clone() for n, p in tree.named_parameters() if not p.requires_grad}
    for _ in range(3):
        x = torch.randn(2, 5, 16)
        tree["attn"](x, x, x, need_weights=False)
    assert all(torch.equal(p, frozen[n]) for n, p in tree.named_parameters() if n in frozen)
