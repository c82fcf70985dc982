"""`nn.MultiheadAttention` with its projections as separate layers, so that they can be adapted."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SplitAttention(nn.Module):
    """Gives what the ``nn.MultiheadAttention`` that it is made from gives, without weights.

    open_clip's towers keep query, key and value in one parameter that no adapter can be put on
    (peft merges into it and subtracts again at every call, and so changes the frozen weights
    by a rounding error each time).
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if not attention._qkv_same_embed_dim or attention.bias_k is not None:
            raise ValueError("attention with other key and value widths cannot be adapted")
        self.num_heads, self.batch_first = attention.num_heads, attention.batch_first
        self.dropout = attention.dropout
        assert attention.in_proj_weight is not None
        weights = attention.in_proj_weight.detach().chunk(3)
        has_bias = attention.in_proj_bias is not None
        biases = attention.in_proj_bias.detach().chunk(3) if has_bias else (None,) * 3
        for name, weight, bias in zip(("q", "k", "v"), weights, biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias)
            linear.weight = nn.Parameter(weight.clone())
            if bias is not None:
                linear.bias = nn.Parameter(bias.clone())
            setattr(self, f"{name}_proj", linear)
        self.out_proj = attention.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        if need_weights or key_padding_mask is not None:
            raise NotImplementedError("need_weights and key_padding_mask are not supported here")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # MultiheadAttention: True is hidden; here: True is seen
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        mixed = F.scaled_dot_product_attention(
            heads(self.q_proj(query)),
            heads(self.k_proj(key)),
            heads(self.v_proj(value)),
            attn_mask=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None


def split_attention(module: nn.Module) -> None:
    """Replace every ``nn.MultiheadAttention`` inside ``module``, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention:
                setattr(parent, name, SplitAttention(child))
