"""Published weights: plain safetensors and a description, free of pickle."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m3bind.errors import M3BindError
from m3bind.models.weights import export_weights, import_config, import_weights


def test_published_weights_are_plain_safetensors_with_their_config(tmp_path) -> None:
    weights = {"head.weight": torch.randn(2, 3)}
    export_weights(tmp_path / "model.safetensors", weights, {"width": 3})
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")["head.weight"], weights["head.weight"]
    )
    found, config = import_weights(tmp_path / "model.safetensors")
    assert config == {"width": 3} and torch.equal(found["head.weight"], weights["head.weight"])
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o444 == 0o444


class Malice:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.safetensors"
    torch.save({"a": Malice()}, path)
    with pytest.raises(M3BindError, match="not a whole safetensors file"):
        import_weights(path)
    path.write_bytes(pickle.dumps(Malice()))
    with pytest.raises(M3BindError, match="not a whole safetensors file"):
        import_weights(path)
    assert not (tmp_path / "executed").exists()


def test_cut_and_missing_files(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(M3BindError, match="no weights at"):
        import_weights(path)
    export_weights(path, {"a": torch.zeros(300)}, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(M3BindError, match="not a whole safetensors file"):
        import_weights(path)


def test_a_damaged_description_of_weights_is_named(tmp_path) -> None:
    (tmp_path / "m3bind_config.json").write_text("{")
    with pytest.raises(M3BindError, match=r"m3bind_config\.json is damaged"):
        import_config(tmp_path / "model.safetensors")
