"""One sample: an image, a volume or a signal with its report and where it came from."""

import hashlib
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3bind.data.constants import EXTENSIONS, KINDS, LEADS, SIGNAL_HZ


@dataclass(kw_only=True, slots=True)
class Record:
    """One sample, as its bytes stand in a shard.

    ``payload`` is an encoded image (``png``, ``jpg``), Hounsfield units (``hu``: int16, little
    endian, [D, H, W] from head to foot) or microvolt (``uv``:
    int16, little endian, [12, T] at 500 Hz in the order of `LEADS`).

    Raises ValueError for values that do not go together.
    """

    id: str
    patient: str
    modality: str
    kind: str
    payload: bytes
    extension: str
    report: str
    split: str
    simulated: bool
    shape: tuple[int, ...] | None = None
    labels: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    spacing_mm: tuple[float, float, float] | None = None
    rate_hz: int | None = None

    def __post_init__(self) -> None:
        if not self.id or set(self.id) & set("./\\ \n"):
            raise ValueError(f"id {self.id!r} must not be empty, nor hold a dot, slash or space")
        if self.kind not in KINDS or self.extension not in EXTENSIONS[self.kind]:
            raise ValueError(f"{self.id}: {self.kind!r} and .{self.extension} do not go together")
        if (self.kind == "image2d") != (self.shape is None):
            raise ValueError(f"{self.id}: shape is {self.shape}, for {self.kind}")
        if self.shape is not None and len(self.payload) != 2 * int(np.prod(self.shape)):
            raise ValueError(f"{self.id}: {len(self.payload)} bytes are not int16 of {self.shape}")
        if not self.report.strip():
            raise ValueError(f"{self.id}: the report is empty: leave the sample out, or write one")

    @classmethod
    def from_image(cls, array: NDArray[Any], **values: Any) -> "Record":
        """Encode [H, W] or [H, W, 3], uint8, or grey uint16, losslessly as PNG."""
        from PIL import Image

        if array.dtype not in (np.uint8, np.uint16) or (
            array.dtype == np.uint16 and array.ndim != 2
        ):
            raise ValueError(f"an image is uint8, or grey uint16, not {array.dtype} {array.shape}")
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG", compress_level=3)
        return cls(kind="image2d", extension="png", payload=buffer.getvalue(), **values)

    @classmethod
    def from_volume(cls, hu: NDArray[Any], **values: Any) -> "Record":
        """Hounsfield units [D, H, W] that fit int16."""
        return cls(kind="volume", extension="hu", **_int16(hu, 3, "Hounsfield units"), **values)

    @classmethod
    def from_signal(cls, microvolt: NDArray[Any], **values: Any) -> "Record":
        """Microvolt [12, T] at 500 Hz that fit int16."""
        if microvolt.shape[0] != len(LEADS):
            raise ValueError(f"an ECG has {len(LEADS)} leads, not {microvolt.shape[0]}")
        packed = _int16(microvolt, 2, "microvolt")
        return cls(kind="signal", extension="uv", rate_hz=SIGNAL_HZ, **packed, **values)

    def array(self) -> NDArray[Any]:
        """The samples: uint8 or uint16 [H, W(, 3)], or int16 as in the payload."""
        if self.shape is not None:
            return np.frombuffer(self.payload, "<i2").reshape(self.shape)
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(self.payload)))

    def meta(self) -> dict[str, Any]:
        """The metadata that stands beside the payload as ``json``."""
        found: dict[str, Any] = {
            "id": self.id, "patient": self.patient, "modality": self.modality,
            "split": self.split, "labels": list(self.labels), "simulated": self.simulated,
            "sha256": hashlib.sha256(self.payload).hexdigest(),
            "source": self.source, "attributes": self.attributes,
        }  # fmt: skip
        if self.spacing_mm is not None:
            found["spacing_mm"] = list(self.spacing_mm)
        if self.rate_hz is not None:
            found["rate_hz"] = self.rate_hz
        return found


def _int16(array: NDArray[Any], ndim: int, unit: str) -> dict[str, Any]:
    if array.ndim != ndim or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{unit} must be integers with {ndim} axes, not {array.dtype} {array.shape}"
        )
    if array.size == 0 or array.min() < -32768 or array.max() > 32767:
        raise ValueError(f"{unit} are empty or beyond int16: look at slope and intercept")
    return {"payload": np.ascontiguousarray(array, "<i2").tobytes(), "shape": tuple(array.shape)}
