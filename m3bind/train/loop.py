"""The loop itself."""

import dataclasses
import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from m3bind.bars import progress_bar
from m3bind.config import TrainConfig
from m3bind.data.loader import Batch
from m3bind.dtypes import multiplies_bf16
from m3bind.errors import Interrupted, M3BindError
from m3bind.parallel import Engine, gathered_objects, is_first, size
from m3bind.parallel.engine import scale_gradients
from m3bind.parallel.world import by_first, claimed_by_first, lost_ranks_named, totals
from m3bind.tracking import Tracker
from m3bind.train.checkpoints import Checkpoints
from m3bind.train.index import Progress
from m3bind.train.interfaces import FitResult, Loader
from m3bind.train.schedule import schedule
from m3bind.train.signals import Stop, stop_signals


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
    group: Any = None,
) -> FitResult:
    """Train ``task`` (see `Task`) and leave it with its best weights.

    Equivalent to, with a schedule, logs and checkpoints around it::

        losses, report = task({name: next(batches) for name, batches in loaders.items()}, rng)
        sum(losses.values()).backward()
        clip_grad_norm_(parameters, config.clip)
        optimizer.step()

    With ``config.accumulate`` above 1, a step is that of the mean of the losses of so many batches.

    ``validate`` returns {"score": higher is better, ...}; it is called every
    ``validate_every`` steps and after the last one. Without it, or where no score is ever a
    finite number, the last weights are the best. Files, all under ``out``:
    ``checkpoints/`` (the last one, to resume, and the best), ``metrics.jsonl`` and
    ``tensorboard/``. ``resume`` goes on from the last checkpoint, where
    there is one; without it, earlier checkpoints are moved to ``checkpoints.previous``.
    ``settings`` are the task's own, by name, in plain values: like ``config`` and ``seed`` they
    stand in the checkpoint, and a resume with others is refused.

    Over ranks (`m3bind.parallel.started`), each calls it with the same arguments and its own part
    of the batches; ``group`` are those that train the same parameters (None: all). Gradients are
    averaged over it as ``config.parallel`` says, so the losses must be those of
    `m3bind.distributed`. All ranks validate, and the first one's score counts. It alone writes
    logs, what ranks of other groups lost and reported included; each writes its part of the
    checkpoints. Where torchrun starts them anew, they go on from the last checkpoint of this run,
    asked or not.

    Raises Interrupted after Ctrl-C or SIGTERM, once a checkpoint is written (a second Ctrl-C
    stops at once), and M3BindError when a loss is not finite, the checkpoint does not fit or
    another process trains in ``out``.
    """
    plain = {**dataclasses.asdict(config), "seed": seed, **(settings or {})}
    training = _Fit(task, loaders, config, Path(out), validate, plain, description, group)
    with claimed_by_first(training.out):
        return training.run(resume)


class _Fit:
    def __init__(
        self,
        task: Any,
        loaders: Mapping[str, Loader],
        config: TrainConfig,
        out: Path,
        validate: Callable[[], dict[str, float]] | None,
        settings: dict[str, Any],
        description: str,
        group: Any,
    ) -> None:
        self.task, self.loaders, self.config, self.out = task, loaders, config, out
        self.validate, self.description = validate, description
        self.engine = Engine(task, config.parallel, group)
        groups = list(task.parameter_groups())
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        for each in self.optimizer.param_groups:
            each["initial_lr"] = each["lr"]
        self.parameters: list[nn.Parameter] = [
            p for each in self.optimizer.param_groups for p in each["params"]
        ]
        self.device = self.parameters[0].device
        self.bf16 = all(gathered_objects(multiplies_bf16(config.bf16, self.device)))
        self.rng = random.Random(settings["seed"])
        self.checkpoints = Checkpoints(
            out, self.engine, self.optimizer, loaders, self.rng, settings
        )
        self.progress = Progress()
        self.tracker: Tracker | None = None  # of the first rank
        self.stopped = False  # as all ranks agreed on

    def run(self, resume: bool) -> FitResult:
        progress = self.progress = self.checkpoints.begin(resume)
        by_first(self._begin_log)
        with self.tracker or nullcontext():
            if progress.step < self.config.steps or self._validation_due():
                # Signals are noted within: torchrun sends one where a rank is lost.
                with stop_signals() as stop, lost_ranks_named(self.description):
                    self._train(stop)
            if progress.best_step == 0:  # nothing to choose by
                progress.best_step, progress.best_score = progress.step, math.nan
                self.checkpoints.choose_last(progress)
            self.checkpoints.load_best()
            return FitResult(
                best_step=progress.best_step,
                best_score=progress.best_score,
                steps=progress.step,
                seconds=progress.seconds,
                history=self.tracker.history if self.tracker else [],
            )

    def _begin_log(self) -> None:
        self.tracker = Tracker(self.out, self.progress.step, self.progress.validated)

    def _train(self, stop: Stop) -> None:
        progress, config = self.progress, self.config
        streams = {name: iter(loader) for name, loader in self.loaders.items()}
        self.started = time.perf_counter() - progress.seconds
        self.logged = time.perf_counter(), progress.step
        bar = progress_bar(
            total=config.steps,
            initial=progress.step,
            desc=self.description,
            unit="step",
            disable=not is_first(),
        )
        with bar:
            while progress.step < config.steps or self._validation_due():
                # A run that was stopped between a step and its validation begins with it.
                improved = False
                if self._validation_due():
                    improved = self._validate()
                else:
                    loss = self._train_step(streams, stop)
                    bar.update()
                    bar.set_postfix(
                        loss=f"{loss:.3f}", best=f"{progress.best_score:.3f}", refresh=False
                    )
                progress.seconds = time.perf_counter() - self.started
                if self.stopped or (size() == 1 and stop.requested):
                    self.checkpoints.save(progress)
                    raise Interrupted(
                        f"{self.description}: stopped at step {progress.step} of {config.steps}, "
                        f"which {self.checkpoints.folder} keeps: run the same command with "
                        "--resume to go on"
                    )
                due = progress.step % config.checkpoint_every == 0 and not self._validation_due()
                if improved or due or progress.step == config.steps:
                    self.checkpoints.save(progress)

    def _train_step(self, streams: Mapping[str, Iterator[Batch]], stop: Stop) -> float:
        config, step = self.config, self.progress.step + 1
        lr_factor = schedule(step, config.warmup, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        self.task.train()
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, float] = {}
        report: dict[str, float] = {}
        for turn in range(config.accumulate):
            with self.engine.accumulating(last=turn == config.accumulate - 1):
                for name, value in self._backward(streams, report).items():
                    values[name] = values.get(name, 0.0) + value / config.accumulate
        self._update(step, values, stop)
        self.progress.step = step
        if step % config.log_every == 0 or step in (1, config.steps):
            self._log(values, report, config.lr * lr_factor)
        return sum(values.values())

    def _backward(
        self, streams: Mapping[str, Iterator[Batch]], report: dict[str, float]
    ) -> dict[str, float]:
        batches = {name: next(stream).to(self.device) for name, stream in streams.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses, said = self.engine(batches, self.rng)
        report.update(said)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        (loss / self.config.accumulate).backward()
        return {name: float(value.detach()) for name, value in losses.items()}

    def _update(self, step: int, values: Mapping[str, float], stop: Stop) -> None:
        """One step of the optimizer, if all is finite on all ranks."""
        norm = float(self.engine.gradient_norm(self.parameters))
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if size() > 1:
            squares, others, stops = totals(norm**2 / self.engine.size, len(bad), stop.requested)
            self.stopped = stops > 0
            if self.engine.size < size():
                norm = math.sqrt(squares)
            if others:
                bad = {name: v for part in gathered_objects(bad) for name, v in part.items()}
        for name, value in bad.items():
            raise M3BindError(
                f"{self.description}: step {step}: the loss {name!r} is {value}: lower lr "
                f"({self.config.lr}) or raise warmup ({self.config.warmup}); {self._what_is_kept()}"
            )
        if not math.isfinite(norm):
            raise M3BindError(
                f"{self.description}: step {step}: the gradient's norm is {norm}, while the losses "
                f"are finite ({dict(values)}): lower lr ({self.config.lr}); {self._what_is_kept()}"
            )
        scale_gradients(self.parameters, norm, self.config.clip or math.inf)
        self.norm = norm
        self.optimizer.step()
        for part in self.task.modules():
            if hasattr(part, "keep_in_bounds"):
                part.keep_in_bounds()

    def _log(self, values: dict[str, float], report: dict[str, float], lr: float) -> None:
        own = values, report, _peak_mib(self.device)
        parts = gathered_objects(own)
        if not self.tracker:
            return
        losses = _means([part[0] for part in parts])
        now, (then, before) = time.perf_counter(), self.logged
        step = self.progress.step
        names = {name for own in self.checkpoints.layout for name in own}
        a_step = sum(map(self.config.batch_of, names)) * self.config.accumulate
        self.logged = now, step
        self.tracker.log(
            step,
            {
                "loss": sum(losses.values()),
                "losses": losses,
                "report": _means([part[1] for part in parts]),
                "lr": lr,
                "grad_norm": self.norm,
                "seconds": round(now - self.started, 3),
                "samples_per_second": round((step - before) * a_step / (now - then), 2),
                "peak_mib": max(part[2] for part in parts),
            },
        )

    def _what_is_kept(self) -> str:
        last = self.checkpoints.last
        return f"{self.checkpoints.folder} keeps {last['folder']}" if last else "nothing is kept"

    def _validation_due(self) -> bool:
        progress = self.progress
        if self.validate is None or progress.step == progress.validated:
            return False
        return progress.step % self.config.validate_every == 0 or progress.step == self.config.steps

    def _validate(self) -> bool:
        """Whether it is the best score so far."""
        assert self.validate is not None
        progress = self.progress
        self.task.eval()
        with torch.no_grad():
            found = self.engine.whole(self.validate)
        found = {name: float(value) for name, value in found.items()}
        scores = gathered_objects(found)[0]
        progress.validated = progress.step
        if not math.isfinite(scores["score"]):
            return False  # nothing could be measured: nothing to log or to choose by
        if self.tracker:
            self.tracker.log(progress.step, {"validation": scores})
        if not scores["score"] > progress.best_score:
            return False
        progress.best_step, progress.best_score = progress.step, scores["score"]
        return True


def _means(parts: list[dict[str, float]]) -> dict[str, float]:
    """Of each number over the ranks that have it: they may hold different experts."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {n: statistics.fmean(part[n] for part in parts if n in part) for n in names}


def _peak_mib(device: torch.device) -> float:
    """The most memory that this rank held so far: of its GPU, or else of its process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)
