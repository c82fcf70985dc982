"""Checkpoints: exact, atomic, and free of pickle."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from m3bind import checkpoint as cp
from m3bind.errors import M3BindError


def test_sections_and_data_come_back_exactly(tmp_path) -> None:
    shared = torch.randn(4, 3)
    model = {"a": shared, "tied": shared, "half": torch.randn(5).bfloat16(), "0d": torch.tensor(3)}
    data = {"step": 3, "best_score": float("-inf"), "name": "é"}
    cp.save_checkpoint(tmp_path / "x.safetensors", {"model": model, "loader": {}}, data)
    sections, found = cp.load_checkpoint(tmp_path / "x.safetensors")
    assert found == data
    assert set(sections) == {"model"} and set(sections["model"]) == set(model)
    for name, tensor in model.items():
        assert torch.equal(sections["model"][name], tensor)
        assert sections["model"][name].dtype == tensor.dtype


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.safetensors"
    cp.save_checkpoint(path, {"model": {"a": torch.zeros(3)}}, {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(M3BindError, match=r"cannot write .*x\.safetensors.*No space"):
        cp.save_checkpoint(path, {"model": {"a": torch.ones(3)}}, {"step": 2})
    assert cp.load_checkpoint(path)[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


class Malice:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.safetensors"
    torch.save({"a": Malice()}, path)
    for load in (cp.load_checkpoint, cp.import_weights):
        with pytest.raises(M3BindError, match="not a whole safetensors file"):
            load(path)
    path.write_bytes(pickle.dumps(Malice()))
    with pytest.raises(M3BindError, match="not a whole safetensors file"):
        cp.load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_cut_foreign_and_missing_files(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(M3BindError, match="no checkpoint at"):
        cp.load_checkpoint(path)
    cp.save_checkpoint(path, {"model": {"a": torch.zeros(300)}}, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(M3BindError, match="not a whole safetensors file"):
        cp.load_checkpoint(path)
    cp.export_weights(path, {"a": torch.zeros(3)}, {})
    with pytest.raises(M3BindError, match="not a checkpoint of this version"):
        cp.load_checkpoint(path)


def test_published_weights_are_plain_safetensors_with_their_config(tmp_path) -> None:
    from safetensors.torch import load_file

    weights = {"head.weight": torch.randn(2, 3)}
    cp.export_weights(tmp_path / "model.safetensors", weights, {"width": 3})
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["head.weight"], weights["head.weight"]
    )
    found, config = cp.import_weights(tmp_path / "model.safetensors")
    assert config == {"width": 3} and torch.equal(found["head.weight"], weights["head.weight"])
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_every_generator_goes_on(tmp_path) -> None:
    def draw(rng: random.Random) -> list[float]:
        return [
            rng.random(), rng.gauss(0, 1), random.random(), random.gauss(0, 1),
            float(np.random.rand()), float(np.random.randn()),
            float(torch.rand(())), float(torch.randn(())),
        ]  # fmt: skip

    rng = random.Random(1)
    draw(rng)  # so that the second halves of the Gaussian pairs are pending
    tensors, data = cp.pack_random(rng)
    cp.save_checkpoint(tmp_path / "r", {"random": tensors}, data)
    expected = draw(rng)
    sections, data = cp.load_checkpoint(tmp_path / "r")
    other = random.Random(99)
    cp.unpack_random(other, sections["random"], data)
    assert draw(other) == expected


def test_bytes_survive_as_tensors() -> None:
    for data in (b"", b"\x00\xff\n", os.urandom(1000)):
        assert cp.unpack_bytes(cp.pack_bytes(data)) == data


def test_a_damaged_description_of_weights_is_named(tmp_path) -> None:
    from m3bind.checkpoint import import_config

    (tmp_path / "m3bind_config.json").write_text("{")
    with pytest.raises(M3BindError, match=r"m3bind_config\.json is damaged"):
        import_config(tmp_path / "model.safetensors")
