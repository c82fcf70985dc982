"""Shards: DALI's own index, webdataset as an independent reader, damage, and the audit."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from m3bind.data.audit import audit, check_patients, shared_patients
from m3bind.data.constants import KIND
from m3bind.data.dataset import Dataset, ModalityInfo
from m3bind.data.shard_writer import ShardWriter
from m3bind.data.shards import (
    iter_records,
    iter_reports,
    read_index,
    shard_paths,
    shards_content,
    whole_samples,
)
from m3bind.errors import M3BindError

from loader_cases import cohort, noise, record, write  # isort: skip


def described(root: Path, *modalities: str) -> Path:
    infos = {m: ModalityInfo(kind=KIND[m], labels=["none"]) for m in modalities}
    Dataset(root=root, name="t", simulated=True, labels=["none"], modalities=infos).write()
    return root


@pytest.mark.parametrize("modality", KIND)
def test_round_trip_and_webdataset_agree(tmp_path, modality) -> None:
    import webdataset

    made = [record(modality, i, noise(modality, i)) for i in range(7)]
    write(tmp_path, made, per_shard=3)
    paths = shard_paths(tmp_path, modality, "train")
    assert [p.name for p in paths] == [f"simulated-{modality}-train-00000{i}.tar" for i in range(3)]
    assert list(iter_records(tmp_path, modality, "train")) == made
    assert list(iter_reports(tmp_path, modality, "train")) == [each.report for each in made]
    urls = [str(path) for path in paths]
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in read] == [each.id for each in made]
    for sample, each in zip(read, made, strict=True):
        assert sample[each.extension] == each.payload and sample["txt"].decode() == each.report
        assert json.loads(sample["json"])["sha256"] == each.meta()["sha256"]
        if each.shape is not None:
            assert tuple(np.frombuffer(sample["shape"], "<i8")) == each.shape


def test_index_is_that_of_dali(tmp_path) -> None:
    pytest.importorskip("nvidia.dali")
    cohort(tmp_path, "ecg", 4)
    cohort(tmp_path, "retina", 4)
    script = Path(sys.executable).with_name("wds2idx")
    for modality in ("ecg", "retina"):
        (path,) = shard_paths(tmp_path, modality, "train")
        subprocess.run([str(script), str(path), str(tmp_path / "idx")], check=True)
        ours = path.with_suffix(".idx").read_text().splitlines()
        truth = (tmp_path / "idx").read_text().splitlines()
        assert [line.split() for line in ours] == [line.split() for line in truth]


def test_writer_refuses_what_does_not_belong(tmp_path) -> None:
    with ShardWriter(tmp_path, "t", "ecg", "train") as writer:
        writer.write(record("ecg", 0, noise("ecg", 0)))
        with pytest.raises(ValueError, match="written before"):
            writer.write(record("ecg", 0, noise("ecg", 0)))
        with pytest.raises(ValueError, match="is of ecg/val"):
            writer.write(record("ecg", 1, noise("ecg", 0), split="val"))
    with pytest.raises(ValueError, match="split 'dev'"):
        ShardWriter(tmp_path, "t", "ecg", "dev")


def test_no_shard_under_its_name_before_it_is_whole(tmp_path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "t", "ecg", "train", 2) as writer:
        for number in range(3):
            writer.write(record("ecg", number, noise("ecg", number)))
        assert len(shard_paths(tmp_path, "ecg", "train")) == 1
        raise RuntimeError
    assert [p.name for p in sorted((tmp_path / "ecg" / "train").iterdir())] == [
        "t-ecg-train-000000.idx", "t-ecg-train-000000.sha256", "t-ecg-train-000000.tar",
    ]  # fmt: skip


@pytest.mark.parametrize("modality", ["ct", "ecg"])  # their payloads have one size
def test_content_changes_with_any_byte_of_a_shard(tmp_path, modality) -> None:
    def made(name: str, *, pixel: int = 0, label: str = "left") -> list[Path]:
        arrays = [np.full((12, 20, 200), i, np.int16) for i in range(4)]
        if modality == "ecg":
            arrays = [np.full((12, 2000), i, np.int16) for i in range(4)]
        arrays[-1][-1, -1] += pixel
        records = [record(modality, i, a, labels=("left",)) for i, a in enumerate(arrays[:-1])]
        write(tmp_path / name, [*records, record(modality, 3, arrays[-1], labels=(label,))])
        return shard_paths(tmp_path / name, modality, "train")

    shards = made("a")
    assert shards[0].stat().st_size > 2 << 16
    content = shards_content(shards)
    assert content == shards_content(made("again"))
    assert content != shards_content(made("pixels", pixel=1))
    assert content != shards_content(made("labels", label="none"))
    # As sha256sum checks it; and without it, or beside a shard that was written since, it is
    # computed.
    written = shards[0].with_suffix(".sha256")
    digest = hashlib.sha256(shards[0].read_bytes()).hexdigest()
    assert written.read_text() == f"{digest}  {shards[0].name}\n"
    written.unlink()
    assert shards_content(shards) == content
    written.write_text(f"{digest}  {shards[0].name}\n")
    data = bytearray(shards[0].read_bytes())
    data[-3000] ^= 1
    shards[0].write_bytes(data)
    os.utime(shards[0], ns=(0, written.stat().st_mtime_ns + 1))
    assert shards_content(shards) != content


def test_prompts_that_leave_a_label_out_are_named(tmp_path) -> None:
    prompts = {"name": {"none": ["no"], "x": ["x"]}, "findings": {"x": ["a sign of x"]}}
    info = ModalityInfo(kind="image2d", labels=["none", "x"], prompts=prompts)
    Dataset(
        root=tmp_path, name="t", simulated=False, labels=["none", "x"], modalities={"xray": info}
    ).write()
    with pytest.raises(M3BindError, match=r"xray\.prompts\.findings has no prompt for .* 'none'"):
        Dataset.load(tmp_path)


def test_audit_counts(tmp_path) -> None:
    write(tmp_path, [record("ecg", i, noise("ecg", i), labels=("none",)) for i in range(3)])
    write(tmp_path, [record("ecg", 9, noise("ecg", 9), split="val")])
    assert audit(described(tmp_path, "ecg")) == {"ecg/train": 3, "ecg/val": 1}


def test_audit_finds_a_patient_in_two_splits_also_across_modalities(tmp_path) -> None:
    write(tmp_path, [record("ecg", 1, noise("ecg", 1))])
    write(tmp_path, [record("retina", 1, noise("retina", 1), split="test")])
    with pytest.raises(M3BindError, match="patient p1 stands in the splits train and test"):
        audit(described(tmp_path, "ecg", "retina"))


def test_two_data_sets_put_together_show_the_same_image_in_two_splits(tmp_path) -> None:
    """Prepared apart, with a salt each, they give one patient two names."""
    write(tmp_path, [record("ecg", 1, noise("ecg", 1))])
    write(tmp_path, [record("ecg", 2, noise("ecg", 1), split="test")])
    with pytest.raises(M3BindError, match=r"same payload stands .* train and test .*ecg-0002"):
        check_patients(described(tmp_path, "ecg"))


def test_patients_of_two_modalities_are_counted(tmp_path) -> None:
    """One split, several modalities: no leak, but to be told."""
    write(tmp_path, [record("ecg", i, noise("ecg", i)) for i in range(5)])
    write(tmp_path, [record("retina", i, noise("retina", i)) for i in range(3, 7)])
    described(tmp_path, "ecg", "retina")
    assert check_patients(tmp_path)["p3"] == {"ecg", "retina"}
    assert shared_patients(tmp_path) == 2


def test_a_run_refuses_a_patient_in_two_splits(tmp_path) -> None:
    from m3bind.config import Config
    from m3bind.stages import Run

    write(tmp_path, [record("ecg", 1, noise("ecg", 1))])
    write(tmp_path, [record("ecg", 1, noise("ecg", 2), split="test")])
    described(tmp_path, "ecg")
    with pytest.raises(M3BindError, match="patient p1 stands in the splits train and test"):
        Run(Config(data=str(tmp_path), output=str(tmp_path / "run")))


def test_index_at_fault(tmp_path) -> None:
    write(tmp_path, [record("ecg", i, noise("ecg", i)) for i in range(3)])
    (path,) = shard_paths(tmp_path, "ecg", "train")
    assert len(read_index(path)) == whole_samples(path) == 3
    index = path.with_suffix(".idx")
    lines = index.read_text().splitlines()
    for bad in ("", "v1.2 4\n" + "\n".join(lines[1:]), "\n".join([*lines[:3], lines[3][:-20]])):
        index.write_text(bad)
        with pytest.raises(M3BindError, match=r"ecg-train-000000\.idx is not a whole index"):
            read_index(path)
    index.unlink()
    with pytest.raises(M3BindError, match=r"000000\.idx is missing: remove the shard"):
        whole_samples(path)


def test_audit_finds_an_unknown_label(tmp_path) -> None:
    write(tmp_path, [record("ecg", 1, noise("ecg", 1), labels=("gout",))])
    with pytest.raises(M3BindError, match=r"ecg-0001 has the label 'gout'"):
        audit(described(tmp_path, "ecg"))


# Every 512 bytes: within a header, within a payload, and between two samples.
def test_audit_finds_a_tar_cut_anywhere(tmp_path) -> None:
    write(tmp_path, [record("retina", i, noise("retina", i)[:4, :4]) for i in range(3)])
    described(tmp_path, "retina")
    (path,) = shard_paths(tmp_path, "retina", "train")
    whole = path.read_bytes()
    last = int(path.with_suffix(".idx").read_text().split()[-2])  # of the last component
    for size in [*range(512, last, 512), last + 3, 700, 0]:
        path.write_bytes(whole[:size])
        with pytest.raises(M3BindError, match=r"retina-train-000000\.tar"):
            audit(tmp_path)
    path.write_bytes(whole)
    assert audit(tmp_path) == {"retina/train": 3}


def test_audit_finds_a_changed_byte(tmp_path) -> None:
    made = [record("ecg", i, noise("ecg", i)) for i in range(2)]
    described(write(tmp_path, made), "ecg")
    (path,) = shard_paths(tmp_path, "ecg", "train")
    content = bytearray(path.read_bytes())
    content[content.find(made[1].payload) + 1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(M3BindError, match="ecg-0001: its bytes do not match its checksum"):
        audit(tmp_path)


def test_description_round_trip_and_faults(tmp_path) -> None:
    prompts = {"name": {"none": ["no abnormality", "caf\u00e9"]}}
    info = ModalityInfo(kind="image2d", labels=["none"], prompts=prompts)
    made = Dataset(
        root=tmp_path, name="t", simulated=False, labels=["none"], modalities={"xray": info},
        extra={"seed": 3},
    )  # fmt: skip
    made.write()
    assert Dataset.load(tmp_path) == made
    path = tmp_path / "dataset.yaml"
    good = path.read_text(encoding="utf-8")
    for bad, words in [
        (good.replace("kind: image2d", "kind: film"), r"modalities\.xray\.kind: 'film'"),
        (good.replace("modalities:", "modality:"), "modalities"),
        ("labels: [", "not YAML"), ("", "must be a mapping"),
        (good.replace("name: t", ""), "the key 'name' is missing"),
        (good.replace("labels:\n- none", "labels: none", 1), "labels: must be a list of texts"),
        (good.replace("xray:", "3:"), "the key 3 is no text"),
        (good.replace("xray:\n", "xray:\n    colour: red\n"), "unknown key 'colour'"),
        (good.replace("- no abnormality", "- 3"), r"prompts\.name\.none: must be a list"),
        (good[: good.index("prompts:")] + "prompts:", r"xray\.prompts: must be a mapping"),
        (good.replace("labels:\n- none", "labels: [some]", 1), "'none' is not among"),
    ]:  # fmt: skip
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(M3BindError, match=words):
            Dataset.load(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(M3BindError, match=r"dataset\.yaml is not YAML"):
        Dataset.load(tmp_path)
    path.unlink()
    with pytest.raises(M3BindError, match=r"no dataset\.yaml"):
        Dataset.load(tmp_path)
