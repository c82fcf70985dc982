"""What a training keeps: one file for all ranks, from which any number of them goes on."""

import hashlib
import math
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3bind.checkpoint import (
    load_checkpoint,
    pack_bytes,
    pack_random,
    save_checkpoint,
    unpack_bytes,
    unpack_random,
)
from m3bind.errors import M3BindError
from m3bind.parallel import Engine, gathered_objects, is_first, meet, rank
from m3bind.parallel.engine import spread_as
from m3bind.parallel.world import launched, sent_to_first

# These say how often something is done, how fast or on how many ranks, not what is computed.
_MAY_CHANGE = (
    "log_every", "checkpoint_every", "num_threads", "prefetch", "parallel", "placement",
)  # fmt: skip


def load_best(task: Any, out: Path) -> int:
    """Give ``task`` the best weights of the run in ``out``; returns their step."""
    sections, data = load_checkpoint(Path(out) / "checkpoints" / "best.safetensors")
    task.load_trainable_state(sections.get("model", {}))
    return int(data["step"])


class Progress:
    """How far a training is: all of it that is plain numbers."""

    def __init__(self) -> None:
        self.step, self.validated, self.seconds = 0, 0, 0.0
        self.best_step, self.best_score = 0, -math.inf


class Checkpoints:
    """The checkpoints of one training under ``out``.

    Every rank calls every method; the first one writes, and all read. Where the ranks or their
    placement are others than when it was written, weights, optimizer and progress go on as they
    were, features too; streams of images and the ranks' own generators begin anew, unlike any
    that was before.
    """

    def __init__(
        self,
        out: Path,
        engine: Engine,
        optimizer: torch.optim.Optimizer,
        loaders: Mapping[str, Any],
        rng: random.Random,
        settings: dict[str, Any],
    ) -> None:
        self.out, self.engine, self.optimizer = out, engine, optimizer
        self.loaders, self.rng, self.settings = loaders, rng, settings
        self.task: Any = engine.task
        self.folder = out / "checkpoints"
        self.last, self.best = (self.folder / f"{name}.safetensors" for name in ("last", "best"))
        names = {p: name for name, p in engine.task.named_parameters()}
        self.parameters = {names[p]: p for g in optimizer.param_groups for p in g["params"]}
        # Who holds what: [[modality, ...] of each rank].
        self.layout = gathered_objects(list(loaders))

    def begin(self, resume: bool) -> Progress:
        """Go on from the last one, if that is wanted and there is one; else set old ones aside."""
        # A restart goes on with what this torchrun wrote, not with what was there before it.
        since = launched()
        found = self.last.is_file() and (resume or self.last.stat().st_mtime > since)
        if not gathered_objects(found)[0]:
            self._set_aside()
            seed = self.settings["seed"]
            torch.manual_seed(seed if is_first() else _mixed(seed, rank()))
            return Progress()
        return self._restored()

    def save_best(self, progress: Progress) -> None:
        """The weights alone. The last checkpoint is of the same step, so that none is of an earlier
        one that goes on from there, and knows another best."""
        self.save_last(progress)
        self._write(self.best, {"model": self._model()}, vars(progress))

    def save_last(self, progress: Progress) -> None:
        """All that a resumed training needs."""
        sections = {"model": self._model(), "optimizer": self._optimizer()}
        generators, random_data = pack_random(self.rng)
        states = {name: loader.state() for name, loader in self.loaders.items()}
        streams = {name: pack_bytes(state.pop("stream")) for name, state in states.items()}
        parts = sent_to_first([generators, random_data, streams, states])
        sections["random"] = _by_rank(part[0] for part in parts)
        sections["loader"] = _by_rank(part[2] for part in parts)
        data = vars(progress) | {
            "random": [part[1] for part in parts],
            "loaders": [part[3] for part in parts],
            "config": self.settings,
            "layout": self.layout,
        }
        self._write(self.last, sections, data)

    def load_best(self) -> None:
        """Give the task the best weights."""
        self._load_model(load_checkpoint(self.best)[0])

    def _write(self, path: Path, sections: dict[str, Any], data: dict[str, Any]) -> None:
        if is_first():
            save_checkpoint(path, sections, data)
        meet()

    def _set_aside(self) -> None:
        if is_first() and self.folder.exists():
            previous = self.out / "checkpoints.previous"
            if self.last.is_file():
                shutil.rmtree(previous, ignore_errors=True)
                self.folder.rename(previous)
            else:  # of a run that did not come as far, for which nothing good is given up
                shutil.rmtree(self.folder)
        meet()

    def _model(self) -> dict[str, Tensor]:
        return self.engine.state(self.task.trainable_state())

    def _load_model(self, sections: dict[str, dict[str, Tensor]]) -> None:
        task, whole = self.task, sections.get("model", {})
        if self.engine.sharded:
            whole = whole | self.engine.spread(task.trainable_state(), whole)
        task.load_trainable_state(whole)

    def _optimizer(self) -> dict[str, Tensor]:
        """Its tensors by ``<parameter>/<name>``; all else of it stands in the settings."""
        own = {
            f"{name}/{key}": value
            for name, p in self.parameters.items()
            for key, value in self.optimizer.state[p].items()
        }
        return self.engine.state(own)

    def _load_optimizer(self, whole: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            found = _under(f"{name}/", whole)
            for key, value in found.items():
                if key != "step" and value.shape != p.shape:
                    raise ValueError(f"{name} has the shape {tuple(p.shape)}, not {value.shape}")
                # AdamW counts steps on the CPU, wherever its parameters lie.
                found[key] = value if key == "step" else spread_as(p, value.to(p.device))
            if found:  # nothing is kept of what never had a gradient
                self.optimizer.state[p] = found

    def _restored(self) -> Progress:
        sections, data = load_checkpoint(self.last)
        self._check(data)
        try:
            self._load_model(sections)
            self._load_optimizer(sections.get("optimizer", {}))
        except ValueError as error:
            raise M3BindError(f"{self.last} does not fit the model: {error}") from None
        progress = Progress()
        for name in vars(progress):
            setattr(progress, name, data[name])
        if len(set(gathered_objects(progress.step))) > 1:
            raise M3BindError(
                f"ranks read different steps of {self.last}: not all see the same file, or one "
                "sees an old one"
            )
        same = data["layout"] == self.layout
        self._load_streams(sections["loader"], data, same)
        source = rank() if same else 0
        generators = _under(f"{source}/", sections["random"])
        unpack_random(self.rng, generators, data["random"][source])
        if not same:
            torch.manual_seed(
                _mixed(self.settings["seed"], progress.step, len(self.layout), rank())
            )
        if progress.best_step == progress.step and not self._best_is_of(progress.step):
            self.save_best(progress)  # it was lost between the two writes
        return progress

    def _best_is_of(self, step: int) -> bool:
        found = is_first() and self.best.is_file() and load_checkpoint(self.best)[1]["step"] == step
        return bool(gathered_objects(found)[0])

    def _check(self, data: dict[str, Any]) -> None:
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
        then, now = (
            dict.fromkeys(m for own in o for m in own) for o in (data["layout"], self.layout)
        )
        if then.keys() != now.keys():
            raise M3BindError(
                f"{self.last} was trained on {', '.join(then)}, not on {', '.join(now)}: start "
                "without --resume"
            )

    def _load_streams(
        self, streams: Mapping[str, Tensor], data: dict[str, Any], same: bool
    ) -> None:
        holders = {m: r for r, own in reversed([*enumerate(data["layout"])]) for m in own}
        for name, loader in self.loaders.items():
            source = rank() if same else holders[name]
            stream = unpack_bytes(streams[f"{source}/{name}"])
            state = {**data["loaders"][source][name], "stream": stream}
            if same:
                loader.load_state(state)
            else:
                loader.load_state_of_others(state, _mixed(data["step"], len(self.layout)))


def _by_rank(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{r}/{name}": tensor for r, part in enumerate(parts) for name, tensor in part.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _mixed(*numbers: int) -> int:
    """One number of 31 bits of several."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "little") >> 1
