"""What every reader gives: samples as arrays with what was done to them, or a reason why not."""

import hashlib
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

MAX_PARTS = 256  # tiles of a slide, or windows of a long ECG, that one file contributes at most


class Unreadable(Exception):
    """One file that cannot become a sample: why, and what its owner can do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@dataclass(kw_only=True, slots=True)
class Reading:
    """One sample out of a file; ``part`` tells the samples of one file apart.

    ``array`` is what `Record.from_image`, `from_volume` or `from_signal` take. Where the file's
    own encoding can stay, ``encoded`` is (extension, bytes) instead.
    """

    array: NDArray[Any] | None = None
    encoded: tuple[str, bytes] | None = None
    part: str = ""
    steps: list[str] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    spacing_mm: tuple[float, float, float] | None = None
    identifiers: tuple[str, ...] = ()  # of the patient, to be looked for in the report; not stored


def one_line(error: BaseException) -> str:
    """A library's error as a phrase: its first line, or its type where it has no message."""
    text = str(error).strip().split("\n")[0].strip()
    return (text or type(error).__name__)[:200].rstrip(".:")


def sha256_of(*paths: Path) -> str:
    """The checksum of a file, or of several together: that of their checksums, sorted."""
    found = []
    for path in paths:
        with path.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(found) == 1:
        return found[0]
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of m3bind and of the packages that read the file."""
    found = {}
    for name in ("m3bind", *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def slices(part: str, shape: tuple[float, ...], unit: str) -> list[tuple[int, int]]:
    """Parse a ``part`` such as ``0:64,100:356``: start and stop of the first axes, whole numbers.

    Axes that are not given are whole. Raises Unreadable for anything else, or beyond ``shape``.
    """
    ranges = part.split(",") if part else []
    if len(ranges) > len(shape):
        raise Unreadable(
            f"part {part!r} has {len(ranges)} ranges for {len(shape)} axes",
            f"give start:stop of at most {len(shape)} axes, in {unit}",
        )
    found = []
    for text, length in zip(ranges, shape, strict=False):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if match is None or not int(match[1]) < int(match[2]) <= length:
            raise Unreadable(
                f"part {part!r}: {text.strip()!r} is not start:stop within 0:{length:g} {unit}",
                "correct the manifest's column part, or leave it empty",
            )
        found.append((int(match[1]), int(match[2])))
    return found


def thin(items: list[Any]) -> list[Any]:
    """At most `MAX_PARTS` of the items, evenly spaced."""
    if len(items) <= MAX_PARTS:
        return items
    return [items[i * len(items) // MAX_PARTS] for i in range(MAX_PARTS)]
