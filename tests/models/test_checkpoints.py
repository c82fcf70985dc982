"""Upstream weights: what is dropped, what fails, and that no code is run."""

import pickle

import pytest
import torch
from torch import nn

from m3bind.models.checkpoints import load_weights, read_weights


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_position_ids_are_dropped_and_reported(model: nn.Module) -> None:
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    extra = {"text.embeddings.position_ids": torch.arange(4)}
    report = load_weights(model, state | extra, source="x.pt")
    assert report.dropped == ["text.embeddings.position_ids"]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_missing_and_unexpected_keys_fail_unless_declared(model: nn.Module) -> None:
    state = dict(model.state_dict())
    state["2.weight"] = state.pop("1.weight")
    with pytest.raises(ValueError, match=r"missing 1\.weight; unexpected 2\.weight"):
        load_weights(model, state, source="x.pt")
    report = load_weights(model, state, source="x.pt", drop=["2.*"], may_miss=["1.*"])
    assert (report.dropped, report.missing) == (["2.weight"], ["1.weight"])


def test_another_shape_is_named(model: nn.Module) -> None:
    state = dict(model.state_dict()) | {"0.weight": torch.zeros(4, 5)}
    with pytest.raises(ValueError, match=r"0\.weight has shape \(4, 5\)"):
        load_weights(model, state, source="x.pt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return open, (str(marker), "w")

    path = tmp_path / "weights.pt"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(ValueError, match="safetensors"):
        read_weights(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="safetensors"):
        read_weights(path)
    assert not marker.exists()


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"none\.safetensors"):
        read_weights(tmp_path / "none.safetensors")
