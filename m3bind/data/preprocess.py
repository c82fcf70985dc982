"""How the bytes of a record become the numbers that an image tower sees.

A `Preprocess` belongs to a tower's weights: the same weights with another preprocessing give
other, silently wrong embeddings. Its fingerprint therefore goes into every checkpoint.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from m3bind.data.constants import KIND, KINDS, LEADS, SIGNAL_HZ

# Aerated lung; soft tissue; calcium and bone: what a radiologist reads one after the other.
CHEST_WINDOWS = ((-1000.0, -400.0), (-160.0, 240.0), (100.0, 1000.0))
_AXES = {"image2d": 2, "volume": 3, "signal": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """What is done to an image, a volume or a signal before a tower; applied by the loader.

    ``size`` is (H, W) in pixels, (D, H, W) in voxels or (T,) in samples at ``rate_hz``.
    Before ``mean`` and ``std`` (one value, or one a channel) the numbers are

    - image2d: [0, 1], whatever the bit depth of the file;
    - volume: for each of ``hu_windows`` a channel, Hounsfield units clipped to it and mapped
      linearly to [-1, 1];
    - signal: millivolt, leads in the order ``LEADS``.

    ``minmax`` maps each image, volume (of one window) or record to its own [0, 1] instead.
    ``fit`` brings a shape to ``size``: "stretch" scales each axis on its own, "crop" scales
    until both axes cover the size and cuts the centre, "pad" scales until both fit and fills with
    black (CT: air). A signal is never scaled in time: it is cut or filled with 0 mV.
    ``resize``, for "crop" of an image2d, is the length of the shorter side before the cut.

    Raises ValueError for values that do not go together.
    """

    kind: str
    size: tuple[int, ...]
    channels: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    interpolation: str = "linear"
    fit: str = "pad"
    resize: int | None = None
    minmax: bool = False
    hu_windows: tuple[tuple[float, float], ...] = ((-1000.0, 1000.0),)
    rate_hz: int = 250

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if len(self.size) != _AXES[self.kind] or min(self.size) < 1:
            raise ValueError(f"size {self.size} of kind {self.kind} needs {_AXES[self.kind]} axes")
        if self.kind == "image2d" and self.channels not in (1, 3):
            raise ValueError(f"channels {self.channels} of kind image2d must be 1 or 3")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} {getattr(self, name)} needs 1 or {self.channels} values")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive")
        if self.interpolation not in ("bicubic", "linear"):
            raise ValueError(f"interpolation {self.interpolation!r} is not bicubic or linear")
        if self.fit not in ("pad", "crop", "stretch"):
            raise ValueError(f"fit {self.fit!r} is not pad, crop or stretch")
        if self.resize is not None and (self.fit != "crop" or self.resize < max(self.size)):
            raise ValueError(f"resize {self.resize} needs fit 'crop' and at least {self.size}")
        if not all(low < high for low, high in self.hu_windows):
            raise ValueError(f"hu_windows {self.hu_windows} must be pairs (lower, upper) in HU")
        if self.kind == "volume" and self.channels != len(self.hu_windows):
            raise ValueError(
                f"channels {self.channels} of kind volume must be the number of hu_windows, "
                f"{len(self.hu_windows)}"
            )
        if self.kind == "volume" and self.minmax and self.channels != 1:
            raise ValueError(f"minmax of kind volume needs one window, not {self.hu_windows}")
        if not 1 <= self.rate_hz <= SIGNAL_HZ:
            raise ValueError(f"rate_hz {self.rate_hz} must be from 1 to {SIGNAL_HZ}")

    @classmethod
    def for_modality(
        cls, modality: str, kind: str | None = None, size: tuple[int, ...] | None = None
    ) -> "Preprocess":
        """The defaults of the small towers; ``kind`` is needed for a modality of your own."""
        kind = kind or KIND.get(modality)
        if kind is None:
            raise ValueError(
                f"modality {modality!r} is not one of {', '.join(KIND)}: give its kind "
                f"({', '.join(KINDS)})"
            )
        defaults: dict[str, Any]
        if kind == "volume":
            defaults = {
                "size": (32, 80, 80), "channels": len(CHEST_WINDOWS), "fit": "stretch",
                "hu_windows": CHEST_WINDOWS,
            }  # fmt: skip
        elif kind == "signal":
            defaults = {"size": (2500,), "channels": len(LEADS), "std": (0.5,)}
        else:
            channels = 1 if modality == "xray" else 3
            # A tile of tissue has no border worth keeping; a film and a fundus have.
            fit = "crop" if modality == "pathology" else "pad"
            defaults = {
                "size": (96, 96), "channels": channels, "fit": fit,
                "mean": (0.5,) * channels, "std": (0.25,) * channels,
            }  # fmt: skip
        if size is not None:
            defaults["size"] = tuple(size)
        return cls(kind=kind, **defaults)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` takes them back."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`."""

        def frozen(value: Any) -> Any:
            return tuple(map(frozen, value)) if isinstance(value, list) else value

        return cls(**{key: frozen(value) for key, value in values.items()})

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change whenever any of the values does."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
