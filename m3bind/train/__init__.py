"""The training loop: one for every task, stoppable at any moment, resumable to the bit."""

from m3bind.train.index import best_weights, has_checkpoint, load_best
from m3bind.train.interfaces import FitResult, Loader, Task
from m3bind.train.loop import fit
from m3bind.train.schedule import schedule

__all__ = [
    "FitResult", "Loader", "Task", "best_weights", "fit", "has_checkpoint", "load_best", "schedule",
]  # fmt: skip
