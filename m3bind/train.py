"""The training loop: one for every task, stoppable at any moment, resumable to the bit."""

import dataclasses
import math
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from m3bind.checkpoint import (
    load_checkpoint,
    pack_bytes,
    pack_optimizer,
    pack_random,
    save_checkpoint,
    unpack_bytes,
    unpack_optimizer,
    unpack_random,
)
from m3bind.config import TrainConfig
from m3bind.data.loader import Batch
from m3bind.errors import Interrupted, M3BindError
from m3bind.tracking import Tracker


class Task(Protocol):
    """What can be trained: an nn.Module with these four methods (m3bind.tasks has three)."""

    def __call__(
        self, batches: dict[str, Batch], rng: random.Random
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the losses, whose sum is minimised, and what else the log should show."""

    def parameter_groups(self) -> Iterable[Any]:
        """What AdamW takes; a group may have its own ``lr`` and ``weight_decay``."""

    def trainable_state(self) -> dict[str, Tensor]:
        """What training changes: trained parameters, and buffers that move."""

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trainable_state`."""


class Loader(Protocol):
    """An endless stream of batches that can be taken up again (m3bind.data has two)."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state(self) -> dict[str, Any]:
        """Plain values, and under "stream" bytes, after the batch that was handed out last."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with the batch after it."""


@dataclass(kw_only=True, slots=True)
class FitResult:
    """What `fit` did; ``best_*`` are of the last step, and NaN, where no score was a number."""

    best_step: int
    best_score: float
    steps: int
    seconds: float  # of training, over all resumed parts
    history: list[dict[str, Any]]  # the lines of metrics.jsonl


def fit(
    task: Any,
    loaders: Mapping[str, Loader],
    config: TrainConfig,
    out: Path,
    *,
    validate: Callable[[], dict[str, float]] | None = None,
    resume: bool = False,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    description: str = "train",
) -> FitResult:
    """Train ``task`` (see `Task`) and leave it with its best weights.

    Equivalent to, with a schedule, logs and checkpoints around it::

        losses, report = task({name: next(batches) for name, batches in loaders.items()}, rng)
        sum(losses.values()).backward()
        clip_grad_norm_(parameters, config.clip)
        optimizer.step()

    ``validate`` returns {"score": higher is better, ...}; it is called every
    ``validate_every`` steps and after the last one. Without it, or where no score is ever a
    finite number, the last weights are the best. Files, all under ``out``:
    ``checkpoints/last.safetensors`` (to resume), ``checkpoints/best.safetensors``,
    ``metrics.jsonl`` and ``tensorboard/``. ``resume`` goes on from the last checkpoint, where
    there is one; without it, earlier checkpoints are moved to ``checkpoints.previous``.
    ``settings`` are the task's own, by name, in plain values: like ``config`` and ``seed`` they
    stand in the checkpoint, and a resume with others is refused.

    Raises Interrupted after Ctrl-C or SIGTERM, once a checkpoint is written (a second Ctrl-C
    stops at once), and M3BindError when a loss is not finite or the checkpoint does not fit.
    """
    plain = {**dataclasses.asdict(config), "seed": seed, **(settings or {})}
    return _Fit(task, loaders, config, Path(out), validate, seed, plain, description).run(resume)


def load_best(task: Any, out: Path) -> int:
    """Give ``task`` the best weights of the run in ``out``; returns their step."""
    sections, data = load_checkpoint(Path(out) / "checkpoints" / "best.safetensors")
    task.load_trainable_state(sections.get("model", {}))
    return int(data["step"])


class _Fit:
    def __init__(
        self,
        task: Any,
        loaders: Mapping[str, Loader],
        config: TrainConfig,
        out: Path,
        validate: Callable[[], dict[str, float]] | None,
        seed: int,
        settings: dict[str, Any],
        description: str,
    ) -> None:
        self.task, self.loaders, self.config, self.out = task, loaders, config, out
        self.validate, self.seed, self.description = validate, seed, description
        self.settings = settings  # of everything, as a checkpoint keeps and compares them
        self.folder = out / "checkpoints"
        self.last, self.best = (self.folder / f"{name}.safetensors" for name in ("last", "best"))
        groups = list(task.parameter_groups())
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.parameters: list[nn.Parameter] = [
            p for group in self.optimizer.param_groups for p in group["params"]
        ]
        self.device = self.parameters[0].device
        self.rng = random.Random(seed)
        self.step, self.validated, self.seconds = 0, 0, 0.0
        self.best_step, self.best_score = 0, -math.inf

    def run(self, resume: bool) -> FitResult:
        if resume and self.last.is_file():
            self._restore()
        else:
            self._begin()
        with Tracker(self.out, self.step) as self.tracker:
            if self.step < self.config.steps or self._validation_due():
                with _stop_signals() as stop:
                    self._train(stop)
            if self.best_step == 0:  # nothing to choose by
                self.best_step, self.best_score = self.step, math.nan
                self._save(self.best, whole=False)
            load_best(self.task, self.out)
            return FitResult(
                best_step=self.best_step,
                best_score=self.best_score,
                steps=self.step,
                seconds=self.seconds,
                history=self.tracker.history,
            )

    def _begin(self) -> None:
        if self.folder.exists():
            previous = self.out / "checkpoints.previous"
            shutil.rmtree(previous, ignore_errors=True)
            self.folder.rename(previous)
        torch.manual_seed(self.seed)

    def _train(self, stop: "_Stop") -> None:
        from tqdm import tqdm

        streams = {name: iter(loader) for name, loader in self.loaders.items()}
        self.started = time.perf_counter() - self.seconds
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=self.description,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )
        with bar:
            while self.step < self.config.steps or self._validation_due():
                # A run that was stopped between a step and its validation begins with it.
                if self._validation_due():
                    self._validate()
                else:
                    loss = self._train_step(streams)
                    bar.update()
                    bar.set_postfix(
                        loss=f"{loss:.3f}", best=f"{self.best_score:.3f}", refresh=False
                    )
                self.seconds = time.perf_counter() - self.started
                if stop.requested:
                    self._save(self.last)
                    raise Interrupted(
                        f"{self.description}: stopped at step {self.step} of {self.config.steps}; "
                        f"{self.last} is written: run the same command with --resume to go on"
                    )
                due = self.step % self.config.checkpoint_every == 0
                if self.step == self.config.steps or (due and not self._validation_due()):
                    self._save(self.last)

    def _train_step(self, streams: Mapping[str, Iterator[Batch]]) -> float:
        config, step = self.config, self.step + 1
        lr_factor = schedule(step, config.warmup, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        batches = {name: next(stream).to(self.device) for name, stream in streams.items()}
        self.task.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            losses, report = self.task(batches, self.rng)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        values = {name: float(value.detach()) for name, value in losses.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise M3BindError(
                    f"{self.description}: step {step}: the loss {name!r} is {value}: lower lr "
                    f"({config.lr}) or raise warmup ({config.warmup}); {self._what_is_kept()}"
                )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip or math.inf)
        if not torch.isfinite(norm):
            raise M3BindError(
                f"{self.description}: step {step}: the gradient's norm is {float(norm)}, while the "
                f"losses are finite ({values}): lower lr ({config.lr}); {self._what_is_kept()}"
            )
        self.optimizer.step()
        self.step = step
        if step % config.log_every == 0 or step in (1, config.steps):
            self.tracker.log(
                step,
                {
                    "loss": float(loss.detach()),
                    "losses": values,
                    "report": report,
                    "lr": config.lr * lr_factor,
                    "grad_norm": float(norm),
                    "seconds": round(time.perf_counter() - self.started, 3),
                },
            )
        return float(loss.detach())

    def _what_is_kept(self) -> str:
        return f"the last checkpoint is {self.last}" if self.last.is_file() else "nothing is kept"

    def _validation_due(self) -> bool:
        if self.validate is None or self.step == self.validated:
            return False
        return self.step % self.config.validate_every == 0 or self.step == self.config.steps

    def _validate(self) -> None:
        assert self.validate is not None
        self.task.eval()
        with torch.no_grad():
            scores = {name: float(value) for name, value in self.validate().items()}
        self.validated = self.step
        if not math.isfinite(scores["score"]):
            return  # nothing could be measured: nothing to log or to choose by
        self.tracker.log(self.step, {"validation": scores})
        if scores["score"] > self.best_score:
            self.best_step, self.best_score = self.step, scores["score"]
            self._save(self.best, whole=False)

    def _save(self, path: Path, whole: bool = True) -> None:
        sections = {"model": self.task.trainable_state()}
        data: dict[str, Any] = {
            "step": self.step,
            "validated": self.validated,
            "best_step": self.best_step,
            "best_score": self.best_score,
            "seconds": self.seconds,
        }
        if whole:
            sections["optimizer"], data["optimizer"] = pack_optimizer(self.optimizer)
            sections["random"], data["random"] = pack_random(self.rng)
            states = {name: loader.state() for name, loader in self.loaders.items()}
            sections["loader"] = {name: pack_bytes(s.pop("stream")) for name, s in states.items()}
            data["loaders"], data["config"] = states, self.settings
        save_checkpoint(path, sections, data)

    def _restore(self) -> None:
        sections, data = load_checkpoint(self.last)
        changed = [
            (key, data["config"].get(key), self.settings.get(key))
            for key in {**data["config"], **self.settings}
            if data["config"].get(key) != self.settings.get(key) and key not in _MAY_CHANGE
        ]
        if changed:
            key, before, now = changed[0]
            raise M3BindError(
                f"{self.last} was trained with {key} = {before}, now it is {now}: set it back, or "
                "start without --resume"
            )
        if set(data["loaders"]) != set(self.loaders):
            raise M3BindError(
                f"{self.last} was trained on {', '.join(data['loaders'])}, not on "
                f"{', '.join(self.loaders)}: start without --resume"
            )
        try:
            self.task.load_trainable_state(sections.get("model", {}))
            unpack_optimizer(self.optimizer, sections.get("optimizer", {}), data["optimizer"])
        except ValueError as error:
            raise M3BindError(f"{self.last} does not fit the model: {error}") from None
        for name, loader in self.loaders.items():
            stream = unpack_bytes(sections["loader"][name])
            loader.load_state({**data["loaders"][name], "stream": stream})
        unpack_random(self.rng, sections["random"], data["random"])
        self.step, self.validated = data["step"], data["validated"]
        self.best_step, self.best_score = data["best_step"], data["best_score"]
        self.seconds = data["seconds"]


# These say how often something is done or how fast, not what is computed.
_MAY_CHANGE = ("log_every", "checkpoint_every", "num_threads", "prefetch")


def schedule(step: int, warmup: int, steps: int) -> float:
    """The share of the learning rate at ``step`` (from 1): linear warm-up, then half a cosine."""
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup + 1)))


class _Stop:
    requested = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Note SIGINT and SIGTERM instead of dying; the second one is Python's as before."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        for each in numbers:
            signal.signal(each, before[each])

    for number in numbers:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, before[number])
