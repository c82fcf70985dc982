"""What has run on a GPU, and right, by `_verified.json`: `m3bind results` writes it from records.

architecture -> primitive -> backend -> dtype -> what was found, with the fingerprint of the
kernels' sources. Nobody writes it by hand.
"""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from m3bind.resources import PACKAGE

FILE = PACKAGE / "_verified.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    device: str
    commit: str
    date: str
    sources: str  # fingerprint of what ran
    tflops: float  # geometric mean of the sizes that all backends of this primitive were timed at


@cache
def table() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def found(architecture: str, primitive: str, backend: str) -> dict[str, Verified]:
    """By dtype: fp32, bf16, ..."""
    entries = table().get(architecture, {}).get(primitive, {}).get(backend, {})
    return {dtype: Verified(**entry) for dtype, entry in entries.items()}
