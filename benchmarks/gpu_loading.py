"""Batches of one pipeline a modality on the GPU beside the CPU's: a line of JSON a modality.

python benchmarks/gpu_loading.py ROWS
"""

import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

from turns import DEVICE

SECONDS = 1.5
BATCH = 8
BOUNDS = {"image2d": 1 / 255, "volume": 1e-4, "signal": 1e-4}
SIZES = {"image2d": (224, 224), "volume": (32, 64, 64), "signal": (2500,)}
CHANNELS = {"image2d": 3, "volume": 1, "signal": 12}


def row(modality: str, outcome: str, **found: float) -> dict:
    missing = dict.fromkeys(("difference", "bound", "samples_s", "samples_s_cpu"))
    return {"modality": modality, "outcome": outcome, **missing, **found}


def measured(modality: str, root: Path) -> dict:
    from m3bind.data.constants import KIND
    from m3bind.data.loader import Loader
    from m3bind.data.preprocess import Preprocess

    kind = KIND[modality]
    preprocess = Preprocess(kind=kind, size=SIZES[kind], channels=CHANNELS[kind])
    device_id = None if DEVICE == "cpu" else 0

    def loader(device_id: int | None, *, train: bool) -> Loader:
        return Loader(
            root, modality, "test", preprocess, BATCH, train=train, augment=False,
            device_id=device_id, num_threads=4,
        )  # fmt: skip

    def rate(device_id: int | None) -> float:
        batches = iter(loader(device_id, train=True))
        next(batches)
        start, seen = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            # On a GPU the copy out of DALI waits for the pipeline: a value has to arrive.
            seen += len(next(batches).to("cpu"))
        return seen / (time.perf_counter() - start)

    pairs = zip(loader(device_id, train=False), loader(None, train=False), strict=True)
    difference = max(float((a.images.cpu() - b.images).abs().max()) for a, b in pairs)
    bound = BOUNDS[kind]
    return row(
        modality, "equal" if difference <= bound else "differs from the CPU's",
        difference=difference, bound=bound, samples_s=rate(device_id), samples_s_cpu=rate(None),
    )  # fmt: skip


def main(rows: Path) -> None:
    try:
        importlib.import_module("nvidia.dali")
        from m3bind.data.constants import MODALITIES
        from m3bind.data.phantom import make_cohort
    except ImportError as error:
        rows.write_text(json.dumps(row("all", f"not run: {error}")) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        make_cohort(Path(folder), seed=0, train=7, val=7, test=14, workers=1)
        for modality in MODALITIES:
            try:
                found = measured(modality, Path(folder))
            except Exception as error:
                found = row(modality, f"failed: {type(error).__name__}: {error}"[:300])
            with rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
