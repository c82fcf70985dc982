"""DALI pipelines: from shards to tensors, one for each kind of data.

Only `m3bind.data.loader` imports this module, when its first batch is asked for. The same graph
runs on a CPU (``device_id=None``) and on a GPU, where images are decoded by "mixed" operators
and everything after the decoder or the reader stays on the device. The GPU side follows DALI's
documentation and has not been run on a GPU yet.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import Pipeline

from m3bind.data import augmentations
from m3bind.data.augmentations import Node, between, device_of
from m3bind.data.constants import EXTENSIONS, SIGNAL_HZ
from m3bind.data.preprocess import Preprocess

READER = "shards"
_RESIZE_MODE = {"stretch": "stretch", "pad": "not_larger", "crop": "not_smaller"}
_SHUFFLE_BUFFER = 4096  # samples; they are memory-mapped, so the buffer holds addresses


def build_pipeline(
    paths: Sequence[Path],
    index_paths: Sequence[Path],
    modality: str,
    preprocess: Preprocess,
    *,
    batch_size: int,
    num_samples: int,
    shuffle: bool,
    augment: bool,
    device_id: int | None,
    shard_id: int,
    num_shards: int,
    seed: int,
    num_threads: int,
    prefetch: int,
    checkpoint: bytes | None,
) -> Pipeline:
    """Return a built pipeline whose outputs are (images, payload, report, metadata).

    ``images`` is float32 of the preprocess' shape; the others are uint8 (int16 for volumes and
    signals) vectors of each sample's own length, always on the CPU.
    """
    kind = preprocess.kind
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        seed=seed,
        prefetch_queue_depth=prefetch,
        enable_checkpointing=True,
        checkpoint=checkpoint,
    )
    with pipeline:
        components = [";".join(EXTENSIONS[kind]), "txt", "json"]
        dtypes = [types.UINT8 if kind == "image2d" else types.INT16, types.UINT8, types.UINT8]
        if kind != "image2d":
            components.append("shape")
            dtypes.append(types.INT64)
        payload, report, metadata, *shape = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path) for path in index_paths],
            ext=components,
            dtypes=dtypes,
            missing_component_behavior="error",
            random_shuffle=shuffle,
            initial_fill=max(1, min(num_samples, _SHUFFLE_BUFFER)),
            shard_id=shard_id,
            num_shards=num_shards,
            stick_to_shard=True,
            # One pass without shuffling ends with whole batches; the loader cuts what was padded.
            pad_last_batch=not shuffle,
            seed=seed,
            name=READER,
        )
        gpu = device_id is not None
        if kind == "image2d":
            images = _image2d(payload, preprocess, modality, augment, gpu)
        elif kind == "volume":
            images = _volume(payload, shape[0], preprocess, augment, gpu)
        else:
            images = _signal(payload, shape[0], preprocess, augment, gpu)
        pipeline.set_outputs(images, payload, report, metadata)
    pipeline.build()
    return pipeline


def _image2d(payload: Node, p: Preprocess, modality: str, augment: bool, gpu: bool) -> Node:
    # As FLOAT the decoder scales by the file's own depth: 8 and 16 bit both become [0, 1].
    images = fn.decoders.image(
        payload,
        device="mixed" if gpu else "cpu",
        output_type=types.RGB if p.channels == 3 else types.GRAY,
        dtype=types.FLOAT,
    )
    if p.minmax:
        images = _minmax(images)
    images = _resize(images, p, 0.0, 1.0)
    if augment:
        images = augmentations.image2d(images, p, modality)
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[*p.mean],
        std=[*p.std],
    )


def _resize(
    images: Node, p: Preprocess, low: float, high: float, roi: dict[str, Node] | None = None
) -> Node:
    """Bring values within [low, high] to ``p.size``, as ``p.fit`` says; low fills the border."""
    size: dict[str, Any] = {"size": [*p.size], "mode": _RESIZE_MODE[p.fit]}
    if p.resize is not None:
        size = {"resize_shorter": p.resize}
    cubic = p.interpolation == "bicubic"
    images = fn.resize(
        images,
        interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
        antialias=True,
        dtype=types.FLOAT,
        **size,
        **(roi or {}),
    )
    if cubic:  # its kernel overshoots at edges
        images = math.clamp(images, low, high)
    if p.fit == "stretch":
        return images
    crop = dict(zip(("crop_d", "crop_h", "crop_w")[-len(p.size) :], p.size, strict=True))
    return fn.crop(images, out_of_bounds_policy="pad", fill_values=low, **crop)


def _volume(payload: Node, shape: Node, p: Preprocess, augment: bool, gpu: bool) -> Node:
    # DALI resizes volumes only with a channel axis: [D, H, W, 1].
    shape = fn.cat(fn.cast(shape, dtype=types.INT32), types.Constant([1], dtype=types.INT32))
    voxels = fn.reshape(payload.gpu() if gpu else payload, shape=shape, layout="DHWC")
    # Clipped as int16, before the resampling: metal must not bleed into its surroundings.
    bounds = [bound for window in p.hu_windows for bound in window]
    low, high = (float(np.clip(round(b), -32768, 32767)) for b in (min(bounds), max(bounds)))
    hu = math.clamp(voxels, np.int16(low), np.int16(high))
    hu = _resize(hu, p, low, high, roi=augmentations.another_position() if augment else {})
    hu = fn.reshape(hu, shape=[*p.size], layout="DHW")
    if augment:
        hu = augmentations.calibration(hu)
    channels = [_minmax(hu)] if p.minmax else [_windowed(hu, *window) for window in p.hu_windows]
    means, stds = (v * (len(channels) // len(v)) for v in (p.mean, p.std))
    channels = [
        c if (mean, std) == (0, 1) else c * (1 / std) - mean / std
        for c, mean, std in zip(channels, means, stds, strict=True)
    ]
    return fn.stack(*channels, axis=0, axis_name="C")


def _windowed(hu: Node, low: float, high: float) -> Node:
    return math.clamp(hu, low, high) * (2.0 / (high - low)) - (high + low) / (high - low)


def _signal(payload: Node, shape: Node, p: Preprocess, augment: bool, gpu: bool) -> Node:
    (samples,) = p.size
    shape = fn.cast(shape, dtype=types.INT32)
    leads = fn.reshape(payload.gpu() if gpu else payload, shape=shape, layout="HW")
    leads = fn.cast(leads, dtype=types.FLOAT) * 0.001
    if p.rate_hz < SIGNAL_HZ:
        # audio_resample does not filter when it reduces the rate: 180 Hz would become 70 Hz.
        taps = types.Constant(low_pass(p.rate_hz)[None, :], device=device_of(gpu))
        leads = fn.filter(leads, taps, border="reflect_101")
    # It works along the first axis, so time comes first until the end.
    signals = fn.transpose(leads, perm=[1, 0])
    if p.rate_hz < SIGNAL_HZ:
        signals = fn.audio_resample(
            signals, in_rate=float(SIGNAL_HZ), out_rate=float(p.rate_hz), quality=20.0
        )
    if p.minmax:
        signals = _minmax(signals)
    # Centred, or anywhere while training; a shorter record is filled with 0 mV at both ends.
    signals = fn.crop(
        fn.reshape(signals, shape=[-1, p.channels, 1], layout="HWC"),
        crop_h=samples,
        crop_w=p.channels,
        crop_pos_y=between(0.0, 1.0) if augment else 0.5,
        out_of_bounds_policy="pad",
        fill_values=0.0,
    )
    signals = fn.reshape(signals, shape=[samples, p.channels], layout="")
    if augment:
        signals = augmentations.signal(signals, p, gpu)
    if any(p.mean) or set(p.std) != {1.0}:
        mean, std = (np.asarray(values, np.float32) for values in (p.mean, p.std))
        scale = types.Constant(1 / std, device=device_of(gpu))
        signals = signals * scale - types.Constant(mean / std, device=device_of(gpu))
    return fn.transpose(signals, perm=[1, 0])


def low_pass(rate_hz: int) -> np.ndarray:
    """Taps of a linear-phase filter at 500 Hz: flat to 0.4 ``rate_hz``, -50 dB from 0.6 on.

    What lies between folds back to frequencies above 0.4 ``rate_hz`` only. A sinc under Kaiser's
    window, whose length and shape follow his formulas (Oppenheim and Schafer, section 7.6).
    """
    attenuation, transition = 50.0, 0.2 * rate_hz / SIGNAL_HZ
    half = int(np.ceil((attenuation - 8) / (2.285 * 2 * np.pi * transition) / 2))
    beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    cutoff = 0.5 * rate_hz / SIGNAL_HZ  # cycles a sample
    taps = np.sinc(2 * cutoff * np.arange(-half, half + 1)) * np.kaiser(2 * half + 1, beta)
    return (taps / taps.sum()).astype(np.float32)


def _minmax(values: Node) -> Node:
    low, high = fn.reductions.min(values), fn.reductions.max(values)
    return (values - low) / math.max(high - low, 1e-6)
