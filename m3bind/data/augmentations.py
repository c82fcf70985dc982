"""How a training sample may differ from the file: as patients and machines differ.

Augmentations never change what a physician would read differently: no mirror for radiographs,
CT and fundi (laterality), none of time or polarity for ECGs. Only tissue has no up, left or right.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types

from m3bind.data.preprocess import Preprocess

Node = Any  # DALI's DataNode, which carries no useful static type


def device_of(gpu: bool) -> str:
    return "gpu" if gpu else "cpu"


def between(low: float, high: float, **kwargs: Any) -> Node:
    return fn.random.uniform(range=[low, high], dtype=types.FLOAT, **kwargs)


def image2d(images: Node, p: Preprocess, modality: str) -> Node:
    """Of values within [0, 1], as its modality varies; those of any other as films do."""
    return _OF_MODALITY.get(modality, _film)(images, p)


def another_position() -> dict[str, Node]:
    """A patient who lies a little elsewhere, in a field of view a little smaller."""
    start, end = ([between(low, low + 0.04) for _ in range(3)] for low in (0.0, 0.96))
    return {"roi_start": fn.stack(*start), "roi_end": fn.stack(*end), "roi_relative": True}


def calibration(hu: Node) -> Node:
    """Another scanner's."""
    return hu + between(-15.0, 15.0)


def signal(signals: Node, p: Preprocess, gpu: bool) -> Node:
    """Another amplifier's gain, muscle noise, breathing, and rarely an electrode that fell off."""
    signals = signals * between(0.9, 1.1)
    # Up to 0.02 mV rms; uniform, because Gaussian numbers take three times as long.
    noise = fn.random.uniform(signals, range=[-1.0, 1.0], dtype=types.FLOAT)
    signals = signals + noise * between(0.0, 0.035)
    (samples,) = p.size
    seconds = types.Constant(
        np.arange(samples, dtype=np.float32)[:, None] / p.rate_hz, device=device_of(gpu)
    )
    breathing = 6.2831853 * between(0.1, 0.4)  # rad/s, as 6 to 24 breaths a minute
    wander = math.sin(seconds * breathing + between(0.0, 6.2831853)) * between(0.0, 0.08)
    signals = signals + wander
    loose = fn.random.coin_flip(probability=0.05)
    off = fn.random.coin_flip(probability=1 / 6, shape=[p.channels], device=device_of(gpu))
    return signals * fn.cast(1 - off * loose, dtype=types.FLOAT)


def _warp(images: Node, p: Preprocess, angle: Node, zoom: float, shift: float, fill: float) -> Node:
    """Rotate by ``angle`` (degrees), zoom by 1 +- zoom and shift by a share of the size."""
    height, width = p.size[-2:]
    centre = [width / 2.0, height / 2.0]
    scale = between(1 - zoom, 1 + zoom)
    matrix = fn.transforms.rotation(angle=angle, center=centre)
    matrix = fn.transforms.scale(matrix, scale=fn.stack(scale, scale), center=centre)
    if shift > 0:
        offset = [between(-shift * length, shift * length) for length in (width, height)]
        matrix = fn.transforms.translation(matrix, offset=fn.stack(*offset))
    return fn.warp_affine(
        images, matrix=matrix, interp_type=types.INTERP_LINEAR, fill_value=fill, inverse_map=False
    )


def _film(images: Node, p: Preprocess) -> Node:
    """Small rotation, zoom, shift, exposure: a patient who stands a little differently."""
    images = _warp(images, p, between(-7.0, 7.0), zoom=0.08, shift=0.04, fill=0.0)
    images = fn.brightness_contrast(
        images, brightness=between(0.9, 1.1), contrast=between(0.85, 1.15), contrast_center=0.5
    )
    return math.clamp(images, 0.0, 1.0)


def _fundus(images: Node, p: Preprocess) -> Node:
    """As a film, with the small differences of colour between cameras."""
    images = _warp(images, p, between(-10.0, 10.0), zoom=0.08, shift=0.03, fill=0.0)
    return _colour(images, p, hue=4.0, saturation=0.15)


def _tissue(images: Node, p: Preprocess) -> Node:
    """Quarter turns, mirrors, magnification, and the colour twist of another stain or scanner."""
    images = fn.flip(
        images,
        horizontal=fn.random.coin_flip(probability=0.5),
        vertical=fn.random.coin_flip(probability=0.5),
    )
    if p.size[0] == p.size[1]:
        quarter = fn.random.uniform(values=[0.0, 90.0], dtype=types.FLOAT)
        # The border that a zoom uncovers is filled with the slide's empty, bright background.
        images = _warp(images, p, quarter, zoom=0.08, shift=0.0, fill=0.9)
    return _colour(images, p, hue=8.0, saturation=0.2)


def _colour(images: Node, p: Preprocess, hue: float, saturation: float) -> Node:
    exposure = {"brightness": between(0.9, 1.1), "contrast": between(0.85, 1.15)}
    if p.channels == 1:
        images = fn.brightness_contrast(images, contrast_center=0.5, **exposure)
    else:
        images = fn.color_twist(
            images,
            hue=between(-hue, hue),
            saturation=between(1 - saturation, 1 + saturation),
            **exposure,
        )
    return math.clamp(images, 0.0, 1.0)


_OF_MODALITY: dict[str, Callable[[Node, Preprocess], Node]] = {
    "xray": _film,
    "retina": _fundus,
    "pathology": _tissue,
}
