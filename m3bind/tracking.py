"""What a run writes down: JSON lines always, TensorBoard beside them.

``metrics.jsonl`` holds one object a line: ``{"step", "loss", "losses", "report", "lr",
"grad_norm", "seconds", "samples_per_second", "peak_mib"}`` for training, of all ranks, and
``{"step", "validation": {...}}`` for validation.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3bind.files import atomic_write, unwritable


class Tracker:
    """Append records to ``out/metrics.jsonl`` and to TensorBoard's ``out/tensorboard``.

    ``step`` is the last step that is kept of an earlier run, ``validated`` its last validation:
    lines after them are dropped, and events from the step on, of which the kept ones are written
    again: a resumed log reads as if nothing had happened. 0 begins anew. Raises M3BindError where
    they cannot be written.
    """

    def __init__(self, out: Path, step: int = 0, validated: int | None = None) -> None:
        last = {"loss": step, "validation": step if validated is None else validated}
        self.path = out / "metrics.jsonl"
        try:
            lines = read_history(self.path) if step else []
            self.history = [
                line for line in lines
                if line["step"] <= last["validation" if "validation" in line else "loss"]
            ]  # fmt: skip
            self._begin(out, step)
        except OSError as error:
            raise unwritable(out, error) from None

    def _begin(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        self._file = self.path.open("a")
        folder = out / "tensorboard"
        if not step and folder.is_dir():
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
        # Events are dropped by their step alone: the last step's, whose validation may be among
        # them, are written again.
        self._board = SummaryWriter(str(folder), purge_step=step)
        for line in self.history:
            if line["step"] >= step:
                self._show(line)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line; numbers, also nested ones, become TensorBoard scalars."""
        line = {"step": step, **values}
        self.history.append(line)
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from None
        self._show(line)

    def _show(self, line: Mapping[str, Any]) -> None:
        """In TensorBoard."""
        for name, value in _scalars({k: v for k, v in line.items() if k != "step"}):
            self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flush both; the tracker is not used afterwards."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, up to the first damaged line (of a crash)."""
    path = Path(path)
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"])})
        except (ValueError, KeyError, TypeError):
            break
    return records


def _scalars(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found.append((f"{prefix}{name}", float(value)))
    return found
