"""After DALI has failed on a batch: find the shard and the sample that made it fail.

DALI says "failed to decode sample 3" of a batch that nobody can see any more. So the shards are
read once more, slowly, without DALI.
"""

import hashlib
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def find_damage(paths: Sequence[Path], extensions: Sequence[str]) -> tuple[Path, str, str] | None:
    """Return (shard, key, what is wrong) of the first damaged sample; None if all are whole.

    ``extensions`` are those of the payload, such as ("png", "jpg") or ("uv",).
    """
    for path in paths:
        key = "its first sample"
        try:
            with tarfile.open(path) as shard:
                sample: dict[str, bytes] = {}
                for member in shard:
                    name, _, extension = member.name.partition(".")
                    if sample and name != key:
                        reason = _wrong(sample, extensions)
                        if reason:
                            return path, key, reason
                        sample = {}
                    key = name
                    file = shard.extractfile(member)
                    sample[extension] = file.read() if file is not None else b""
                reason = _wrong(sample, extensions) if sample else "holds no sample"
                if reason:
                    return path, key, reason
        except (tarfile.TarError, OSError, EOFError) as error:
            return path, key, f"the tar file cannot be read beyond it ({error})"
        if not path.with_suffix(".idx").is_file():
            return path, key, f"its index {path.with_suffix('.idx').name} is missing"
    return None


def _wrong(sample: dict[str, bytes], extensions: Sequence[str]) -> str | None:
    found = [extension for extension in extensions if extension in sample]
    missing = [part for part in ("txt", "json") if part not in sample]
    if not found or missing:
        return f"lacks {', '.join(missing or [' or '.join(extensions)])}"
    payload = sample[found[0]]
    try:
        meta = json.loads(sample["json"])
        sample["txt"].decode()
    except ValueError as error:
        return f"its text is damaged ({error})"
    if hashlib.sha256(payload).hexdigest() != meta.get("sha256"):
        return "its bytes do not match its checksum"
    if found[0] in ("hu", "uv"):
        shape = np.frombuffer(sample.get("shape", b""), dtype="<i8")
        if len(payload) != 2 * int(np.prod(shape)) or not len(shape):
            return (
                f"it has {len(payload)} bytes, which is not shape {tuple(shape.tolist())} of int16"
            )
        return None
    return _undecodable(payload)


def _undecodable(payload: bytes) -> str | None:
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(payload)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three
        return f"its image cannot be decoded ({error})"
    return None
