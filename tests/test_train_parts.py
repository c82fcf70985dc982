"""Tensors in parts, and generators: exact, whole or refused, and free of pickle."""

import json
import os
import pickle
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from m3bind.errors import M3BindError
from m3bind.train import parts
from m3bind.train.generators import pack_random, unpack_random
from m3bind.train.parts import Parts, pack, save_parts, unpack


def test_tensors_come_back_exactly(tmp_path) -> None:
    shared = torch.randn(4, 3)
    tensors = {
        "model/a": shared, "model/tied": shared, "model/row": shared[1], "model/t": shared.t(),
        "model/half": torch.randn(5).bfloat16(), "model/0d": torch.tensor(3),
        "model/none": torch.zeros(0, 2), "other/long": torch.tensor([2**40]),
    }  # fmt: skip
    parts = Parts(tmp_path / "x", save_parts(tmp_path / "x", tensors))
    found = parts.read("")
    assert found.keys() == tensors.keys() == parts.like.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    assert set(parts.read("other/")) == {"long"}
    # What one process wrote, others read without this library.
    (file,) = (tmp_path / "x").iterdir()
    assert torch.equal(load_file(file)["model/t"], shared.t())


def test_what_does_not_fit_is_named(tmp_path) -> None:
    folder = tmp_path / "x"
    parts = Parts(folder, save_parts(folder, {"a": torch.zeros(3, 2)}))
    with pytest.raises(M3BindError, match=r"a is float32 \(3, 2\), and should be float32 \(2, 3\)"):
        parts.fill("", {"a": torch.zeros(2, 3)})
    with pytest.raises(M3BindError, match=r"b is missing, and should be float32 \(4,\)"):
        parts.fill("", {"b": torch.zeros(4)})
    with pytest.raises(M3BindError, match=r"a is float32 \(3, 2\), and should be int32 \(3, 2\)"):
        parts.fill("", {"a": torch.zeros(3, 2, dtype=torch.int32)})


def test_what_went_wrong_is_told_as_it_was(tmp_path, monkeypatch) -> None:
    with pytest.raises(M3BindError, match=r"could not be written .*complex128") as told:
        save_parts(tmp_path / "x", {"a": torch.zeros(3, dtype=torch.complex128)})
    assert "space" not in str(told.value) and told.value.__cause__ is not None

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_parts(tmp_path / "y", {"a": torch.zeros(3)})


def test_no_more_than_one_file_is_held_while_it_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parts, "FILE_BYTES", 1 << 20)
    quarters = [4, 2, 2, 1, 5, 0, 4, 4]  # of a MiB, and one number more
    tensors = {f"t{i}": torch.randn(2**16 * n + 1) for i, n in enumerate(quarters)}
    save_parts(tmp_path / "imports", {"a": torch.zeros(3)})
    tracemalloc.start()
    try:
        extent = save_parts(tmp_path / "x", tensors)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    files = [file.stat().st_size for file in sorted((tmp_path / "x").iterdir())]
    assert [round(size / 2**18) for size in files] == [4, 2, 3, 5, 0, 4, 4]
    assert 5 / 4 < peak / 2**20 < 2 * 5 / 4  # of all 22 / 4; only bytes are traced
    found = Parts(tmp_path / "x", extent).read("")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


WHOLE = {"tensors": 1, "numbers": 300}


class Malice:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_damaged_missing_and_foreign_folders(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "x"
    with pytest.raises(M3BindError, match="is not a whole checkpoint"):
        Parts(folder, WHOLE)
    save_parts(folder, {"a": torch.zeros(300)})
    with pytest.raises(M3BindError, match="is not a whole checkpoint: 1 of 2 tensors"):
        Parts(folder, WHOLE | {"tensors": 2})
    with pytest.raises(M3BindError, match="is not a whole checkpoint: 300 of 301 numbers"):
        Parts(folder, WHOLE | {"numbers": 301})
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for damage in (whole[:-10], whole[:20], b"", pickle.dumps(Malice())):
        file.write_bytes(damage)
        with pytest.raises(M3BindError, match="is not a whole checkpoint"):
            Parts(folder, WHOLE)
    torch.save({"a": Malice()}, file)
    with pytest.raises(M3BindError, match="is not a whole checkpoint"):
        Parts(folder, WHOLE)
    assert not (tmp_path / "executed").exists()


def test_every_generator_goes_on() -> None:
    def draw(rng: random.Random) -> list[float]:
        return [
            rng.random(), rng.gauss(0, 1), random.random(), random.gauss(0, 1),
            float(np.random.rand()), float(np.random.randn()),
            float(torch.rand(())), float(torch.randn(())),
        ]  # fmt: skip

    rng = random.Random(1)
    draw(rng)  # so that the second halves of the Gaussian pairs are pending
    tensors, data = pack_random(rng)
    data = json.loads(json.dumps(data))
    expected = draw(rng)
    other = random.Random(99)
    unpack_random(other, tensors, data)
    assert draw(other) == expected


def test_bytes_survive_as_tensors() -> None:
    for data in (b"", b"\x00\xff\n", os.urandom(1000)):
        assert unpack(pack(data)) == data
