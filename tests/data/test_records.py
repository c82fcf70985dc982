"""Records: what goes in comes out, and what does not go together is refused."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from m3bind.data.constants import KIND
from m3bind.data.records import Record

from loader_cases import noise, record  # isort: skip


@pytest.mark.parametrize("modality", KIND)
def test_array_comes_back_to_the_bit(modality) -> None:
    array = noise(modality, 1)
    made = record(modality, 1, array)
    np.testing.assert_array_equal(made.array(), array)
    assert made.array().dtype == array.dtype
    meta = made.meta()
    assert meta["sha256"] == hashlib.sha256(made.payload).hexdigest()
    assert meta.get("rate_hz") == (500 if modality == "ecg" else None)


def test_payloads_are_what_the_shards_promise() -> None:
    film = noise("xray", 0)
    with Image.open(io.BytesIO(record("xray", 0, film).payload)) as image:
        assert image.format == "PNG" and image.mode.startswith("I;16")
    for modality in ("ct", "ecg"):
        array = noise(modality, 0)
        made = record(modality, 0, np.asfortranarray(array.astype(">i4")))
        assert made.payload == array.astype("<i2").tobytes() and made.shape == array.shape


# one value at a time that does not go with the others
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"id": "a.b"}, "dot"), ({"id": "a/b"}, "slash"), ({"id": ""}, "empty"),
        ({"report": " \n"}, "report is empty"), ({"extension": "hu"}, "do not go together"),
        ({"kind": "film"}, "do not go together"), ({"shape": (2, 2)}, "shape"),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together(values, words) -> None:
    good = {
        "id": "a", "patient": "p", "modality": "xray", "kind": "image2d", "payload": b"x",
        "extension": "png", "report": "r", "split": "train", "simulated": True,
    }  # fmt: skip
    Record(**good)
    with pytest.raises(ValueError, match=words):
        Record(**good | values)


@pytest.mark.parametrize(
    ("modality", "array", "words"),
    [
        ("xray", np.zeros((4, 4), np.float32), "uint8, or grey uint16"),
        ("retina", np.zeros((4, 4, 3), np.uint16), "uint8, or grey uint16"),
        ("ct", np.zeros((4, 4, 4)), "integers with 3 axes"),
        ("ct", np.zeros((4, 4), np.int16), "integers with 3 axes"),
        ("ct", np.full((1, 2, 2), 40000), "beyond int16"),
        ("ct", np.zeros((0, 2, 2), np.int16), "empty"),
        ("ecg", np.zeros((11, 500), np.int16), "12 leads, not 11"),
    ],
)
def test_arrays_that_are_refused(modality, array, words) -> None:
    with pytest.raises(ValueError, match=words):
        record(modality, 0, array)
