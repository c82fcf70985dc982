import numpy as np
import pytest

from m3bind.errors import M3BindError
from m3bind.eval.store import EmbeddingSet, as_unit, load_stage, save_stage


def _unit(rng: np.random.Generator, n: int, d: int = 8) -> np.ndarray:
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _set(rng: np.random.Generator, **changes) -> EmbeddingSet:
    fields = {
        "modality": "xray",
        "split": "test",
        "image": _unit(rng, 4),
        "text": _unit(rng, 4),
        "labels": ["none", "a/b", "", "ü"],
        "ids": list("wxyz"),
        "prompts": {"name": {"none": _unit(rng, 2), "a/b": _unit(rng, 3)}},
        "simulated": True,
    }
    return EmbeddingSet(**{**fields, **changes})


def test_round_trip_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    # a transposed view: safetensors would write its memory, not its values
    item = _set(rng, image=np.asfortranarray(_unit(rng, 4)))
    save_stage(tmp_path, "before", [item, _set(rng, modality="ct"), _set(rng, split="train")])
    loaded = load_stage(tmp_path, "before")
    assert set(loaded) == {"xray", "ct"}
    back = loaded["xray"]
    np.testing.assert_array_equal(back.image, item.image)
    np.testing.assert_array_equal(back.text, item.text)
    np.testing.assert_array_equal(back.prompts["name"]["a/b"], item.prompts["name"]["a/b"])
    assert (back.labels, back.ids, back.simulated) == (item.labels, item.ids, True)
    assert load_stage(tmp_path, "never_run") == {}
    assert not list(tmp_path.rglob("*.part"))


def test_a_damaged_file_is_one_clear_error(tmp_path):
    path = tmp_path / "xray-test.safetensors"
    _set(np.random.default_rng(0)).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(M3BindError, match=r"xray-test\.safetensors.*m3bind embed"):
        EmbeddingSet.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ["w", "x", "y", "y"]}, "twice"),
        ({"labels": ["none"]}, "1 labels for 4 rows"),
        ({"image": np.full((4, 8), np.nan, np.float32)}, "norm nan"),
        ({"text": np.ones((4, 8), np.float32)}, "text embeddings: row 0 has norm 2.828"),
        ({"text": np.eye(4, dtype=np.float32)}, "shared width"),
    ],
)
def test_bad_embeddings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _set(np.random.default_rng(0), **changes)


def test_tensors_are_taken():
    torch = pytest.importorskip("torch")
    assert as_unit(torch.eye(3), "x").dtype == np.float32
