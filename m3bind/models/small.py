"""Small residual convolution towers for images, volumes and signals, trained from scratch.

They are sized so that a demonstration trains five of them on two CPU cores. Batch norm, since
they learn in fewer steps than with group norm; once frozen, as stage 1 freezes them,
an embedding does not depend on the other samples of its batch.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONV: dict[str, type[nn.Module]] = {
    "image2d": nn.Conv2d,
    "volume": nn.Conv3d,
    "signal": nn.Conv1d,
}
NORM: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Conv1d: nn.BatchNorm1d,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallShape:
    """``stem``: (width, kernel, stride) of the first layers; ``blocks``: (width, stride)."""

    stem: tuple[tuple[int, int, int], ...]
    blocks: tuple[tuple[int, int], ...]
    kernel: int = 3


SHAPES = {
    "image2d": SmallShape(stem=((16, 3, 2), (32, 3, 2)), blocks=((64, 2), (128, 2), (256, 2))),
    "volume": SmallShape(stem=((48, 4, 4),), blocks=((64, 2), (128, 2))),
    "signal": SmallShape(stem=((32, 15, 4),), blocks=((64, 2), (128, 2), (192, 2)), kernel=7),
}


class Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, conv: type[nn.Module], inner: int, outer: int, stride: int, k: int) -> None:
        super().__init__()
        self.conv1 = conv(inner, outer, k, stride, k // 2, bias=False)
        self.norm1 = NORM[conv](outer)
        self.conv2 = conv(outer, outer, k, 1, k // 2, bias=False)
        self.norm2 = NORM[conv](outer)
        same = inner == outer and stride == 1
        self.shortcut = nn.Identity() if same else conv(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(inner)))


class SmallTower(nn.Module):
    """[B, C, H, W], [B, C, D, H, W] or [B, C, T] to features [B, ``width``].

    The features are the mean and the maximum over all positions: a sign may fill the image or
    be one small spot.
    """

    def __init__(self, kind: str, channels: int, shape: SmallShape | None = None) -> None:
        super().__init__()
        if kind not in CONV:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(CONV)}")
        shape = shape or SHAPES[kind]
        conv = CONV[kind]
        layers: list[nn.Module] = []
        for width, kernel, stride in shape.stem:
            # A kernel as wide as its stride cuts patches: padding would only shift them.
            pad = 0 if kernel == stride else kernel // 2
            layers += [conv(channels, width, kernel, stride, pad, bias=False), NORM[conv](width)]
            layers += [nn.ReLU(inplace=True)]
            channels = width
        for width, stride in shape.blocks:
            layers.append(Block(conv, channels, width, stride, shape.kernel))
            channels = width
        self.layers = nn.Sequential(*layers)
        self.kind = kind
        self.width = 2 * channels

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "image2d":
            images = images.contiguous(memory_format=torch.channels_last)
        # torch 2.15's bfloat16 conv3d gives wrong, even infinite, weight gradients on a CPU.
        unsafe = self.kind == "volume" and images.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if unsafe else contextlib.nullcontext():
            x = self.layers(images).flatten(2)
        return torch.cat([x.mean(2), x.amax(2)], dim=1)
