"""After DALI has failed on a batch: find the shard and the sample that made it fail.

DALI says "failed to decode sample 3" of a batch that nobody can see any more. So the shards are
read once more, slowly, without DALI.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m3bind.data.shards import AGAIN, iter_samples
from m3bind.errors import M3BindError


def damaged(path: Path, key: str, reason: str) -> M3BindError:
    """The error for one sample."""
    return M3BindError(f"{path}: sample {key}: {reason}: {AGAIN}")


def find_damage(paths: Sequence[Path], extensions: Sequence[str]) -> M3BindError | None:
    """Return an error that names the first damaged sample; None if all are whole.

    ``extensions`` are those of the payload, such as ("png", "jpg") or ("uv",).
    """
    for path in paths:
        samples = 0
        try:
            for key, parts in iter_samples(path):
                samples += 1
                reason = _wrong(parts, extensions)
                if reason:
                    return damaged(path, key, reason)
        except M3BindError as error:  # a tar file that ends too early
            return error
        index = path.with_suffix(".idx")
        if not index.is_file() or index.read_text().split()[1:2] != [str(samples)]:
            return damaged(path, f"1 to {samples}", f"{index.name} is not its index")
    return None


def _wrong(parts: dict[str, bytes], extensions: Sequence[str]) -> str | None:
    found = [extension for extension in extensions if extension in parts]
    missing = [part for part in ("txt", "json") if part not in parts]
    if not found or missing:
        return f"it lacks {', '.join(missing) or ' or '.join(extensions)}"
    payload = parts[found[0]]
    try:
        meta = json.loads(parts["json"])
        parts["txt"].decode()
    except ValueError as error:
        return f"its text is damaged ({error})"
    if hashlib.sha256(payload).hexdigest() != meta.get("sha256"):
        return "its bytes do not match its checksum"
    if found[0] in ("hu", "uv"):
        shape = tuple(np.frombuffer(parts.get("shape", b""), dtype="<i8").tolist())
        if not shape or len(payload) != 2 * int(np.prod(shape)):
            return f"its {len(payload)} bytes are not int16 of the shape {shape}"
        return None
    return _undecodable(payload)


def _undecodable(payload: bytes) -> str | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(payload)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three
        return f"its image cannot be decoded ({error})"
    return None
