"""What a training keeps, from which any number of ranks goes on."""

import hashlib
import json
import math
import random
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3bind.errors import M3BindError
from m3bind.files import sync, write_json
from m3bind.parallel import Engine, gathered_objects, is_first, rank, size
from m3bind.parallel.world import by_first, launched
from m3bind.train.generators import pack_random, unpack_random
from m3bind.train.index import FORMAT, Progress, has_checkpoint, index_of, parts_of, read_checkpoint
from m3bind.train.parts import Parts, pack, save_parts, unpack

# These say how often something is done, how fast or on how many ranks, not what is computed.
_MAY_CHANGE = (
    "log_every", "checkpoint_every", "num_threads", "prefetch", "parallel", "placement",
)  # fmt: skip


class Checkpoints:
    """The checkpoints of one training under ``out``.

    ``checkpoints/index.json`` names the folders of the last and the best one, beside it: it is
    replaced in one move once all ranks have written their parts, so one whole checkpoint is
    always there. Every rank calls every method. Where the ranks or their placement are others
    than when it was written, weights, optimizer and progress go on as they were, features too;
    streams of images and torch's generators begin anew, unlike any that was before.
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
        self.loaders, self.rng = loaders, rng
        self.settings = json.loads(json.dumps(settings))  # as they come back
        self.task: Any = engine.task
        self.index = index_of(out)
        self.folder = self.index.parent
        self.last: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        names = {p: name for name, p in engine.task.named_parameters()}
        self.parameters = {names[p]: p for g in optimizer.param_groups for p in g["params"]}
        # Who holds what: [[modality, ...] of each rank].
        self.layout = gathered_objects(list(loaders))

    def begin(self, resume: bool) -> Progress:
        """Go on from the last one, if that is wanted and there is one; else set old ones aside."""
        # A restart goes on with what this torchrun wrote, not with what was there before it.
        since = -math.inf if resume else launched()
        if by_first(lambda: has_checkpoint(self.out, since)):
            return self._restored()
        by_first(self._set_aside)
        seed = self.settings["seed"]
        torch.manual_seed(seed if is_first() else _mixed(seed, rank()))
        return Progress()

    def save(self, progress: Progress) -> None:
        """All that a resumed training needs; these are the best weights, if it is their step."""
        # Never used before: what an earlier attempt still writes cannot come among it.
        name = by_first(lambda: f"step-{progress.step}-{secrets.token_hex(4)}")
        try:
            self.last = {"folder": name, **save_parts(self.folder / name, self._tensors())}
        except M3BindError:
            by_first(self._remove_old)  # room for what comes next
            raise
        if progress.best_step == progress.step:
            self.best = self.last
        self._write_index(progress)

    def choose_last(self, progress: Progress) -> None:
        """The last weights are the best, where nothing else tells."""
        if not self.last:  # there was no step to take
            self.save(progress)
        self.best = self.last
        self._write_index(progress)

    def _write_index(self, progress: Progress) -> None:
        data = vars(progress) | {
            "format": FORMAT,
            "last": self.last,
            "best": self.best,
            "config": self.settings,
            "layout": self.layout,
        }

        def write() -> None:
            sync(self.folder / self.last["folder"])
            sync(self.folder)
            write_json(self.index, data)
            self._remove_old()

        by_first(write)

    def load_best(self) -> None:
        """Give the task the best weights."""
        self._load_model(self._parts(self.best))

    def _parts(self, which: dict[str, Any]) -> Parts:
        """One rank reads the headers of all files; every rank calls it."""
        return by_first(lambda: parts_of(self.out, which))

    def _tensors(self) -> dict[str, Tensor]:
        generators, random_data = pack_random(self.rng)
        states = {name: loader.state() for name, loader in self.loaders.items()}
        own = {f"random/{name}": tensor for name, tensor in generators.items()}
        own |= {f"loader/{name}": pack(state.pop("stream")) for name, state in states.items()}
        own["plain"] = pack(json.dumps({"random": random_data, "loaders": states}).encode())
        return {
            **_under("model/", self._model()),
            **_under("optimizer/", self._optimizer(self.optimizer.state)),
            **_under(f"rank/{rank()}/", own),
        }

    def _model(self) -> dict[str, Tensor]:
        """This rank's: parameters are alike on all ranks of the group, or in parts; of what is not,
        as are a batch norm's statistics, that of the first one is kept."""
        alike = {p.data_ptr() for p in self.task.parameters() if not hasattr(p, "placements")}
        first = rank(self.engine.group) == 0
        return {
            name: tensor
            for name, tensor in self.task.trainable_state().items()
            if first or hasattr(tensor, "placements") or tensor.data_ptr() in alike
        }

    def _optimizer(self, states: Mapping[Any, Any]) -> dict[str, Tensor]:
        """Its tensors by ``<parameter>/<name>``; all else of it stands in the settings."""
        return {
            f"{name}/{key}": value
            for name, p in self.parameters.items()
            for key, value in states[p].items()
        }

    def _restored(self) -> Progress:
        data = by_first(lambda: read_checkpoint(self.out))
        self._check(data)
        progress = Progress()
        for name in vars(progress):
            setattr(progress, name, data[name])
        self.last, self.best = data["last"], data["best"]
        parts = self._parts(self.last)
        self._load_model(parts)
        self._load_optimizer(parts)
        same = data["layout"] == self.layout
        source = rank() if same else 0
        kept, plain = _of_rank(parts, source)
        generators = {n.removeprefix("random/"): t for n, t in kept.items() if "random/" in n}
        unpack_random(self.rng, generators, plain["random"])
        self._load_streams(parts, data, same)
        seed = _mixed(self.settings["seed"], progress.step, len(self.layout), rank())
        if not same:
            torch.manual_seed(seed)
        elif torch.cuda.is_available() and "cuda" not in generators:  # written without a GPU
            torch.cuda.manual_seed(seed)
        by_first(self._remove_old)  # what a run left that was stopped while it wrote
        return progress

    def _load_model(self, parts: Parts) -> None:
        own = self.task.trainable_state()
        there = set(parts.under("model/"))
        self._check_names(parts, "model", there, own)
        state = {name: torch.empty_like(tensor.detach()) for name, tensor in own.items()}
        parts.fill("model/", state)
        try:
            self.task.load_trainable_state(state)
        except ValueError as error:
            raise M3BindError(f"{parts.folder} does not fit the model: {error}") from None

    def _check_names(
        self, parts: Parts, what: str, there: set[str], own: Iterable[str], all_of_them: bool = True
    ) -> None:
        wanted = set(own)
        if self.engine.size < size():  # ranks may hold different experts
            wanted = {name for names in gathered_objects(list(wanted)) for name in names}
        if there - wanted or (all_of_them and wanted - there):
            raise M3BindError(
                f"{parts.folder} does not fit the {what}: missing {sorted(wanted - there)[:5]}, "
                f"unexpected {sorted(there - wanted)[:5]}"
            )

    def _load_optimizer(self, parts: Parts) -> None:
        there = {name.rpartition("/")[0] for name in parts.under("optimizer/")}
        self._check_names(parts, "optimizer", there, self.parameters, all_of_them=False)
        # AdamW counts steps on the CPU, wherever its parameters lie. Nothing is kept of what never
        # had a gradient.
        states = {
            p: {
                key: torch.zeros(()) if key == "step" else torch.empty_like(p.detach())
                for key in parts.under(f"optimizer/{name}/")
            }
            for name, p in self.parameters.items()
        }
        parts.fill("optimizer/", self._optimizer(states))
        self.optimizer.state.update({p: state for p, state in states.items() if state})

    def _load_streams(self, parts: Parts, data: dict[str, Any], same: bool) -> None:
        holders = {m: r for r, own in reversed([*enumerate(data["layout"])]) for m in own}
        for name, loader in self.loaders.items():
            kept, plain = _of_rank(parts, rank() if same else holders[name])
            state = plain["loaders"][name] | {"stream": unpack(kept[f"loader/{name}"])}
            if same:
                loader.load_state(state)
            else:
                loader.load_state_of_others(state, _mixed(data["step"], len(self.layout)))

    def _check(self, data: dict[str, Any]) -> None:
        changed = [
            (key, data["config"].get(key), self.settings.get(key))
            for key in {**data["config"], **self.settings}
            if data["config"].get(key) != self.settings.get(key) and key not in _MAY_CHANGE
        ]
        if changed:
            key, before, now = changed[0]
            raise M3BindError(
                f"{self.index} was trained with {key} = {before}, now it is {now}: set it back, or "
                "start without --resume"
            )
        then, now = (
            dict.fromkeys(m for own in o for m in own) for o in (data["layout"], self.layout)
        )
        if then.keys() != now.keys():
            raise M3BindError(
                f"{self.index} was trained on {', '.join(then)}, not on {', '.join(now)}: start "
                "without --resume"
            )

    def _kept(self) -> set[str]:
        return {which["folder"] for which in (self.last, self.best) if which}

    def _remove_old(self) -> None:
        for folder in self.folder.glob("step-*"):
            if folder.name not in self._kept():
                shutil.rmtree(folder, ignore_errors=True)

    def _set_aside(self) -> None:
        if not self.folder.exists():
            return
        previous = self.out / "checkpoints.previous"
        unfinished = (path.name.startswith(("step-", ".")) for path in self.folder.iterdir())
        if all(unfinished):  # of a run that did not come as far, for which nothing good is given up
            shutil.rmtree(self.folder)
            return
        if previous.exists():
            shutil.rmtree(previous)
        self.folder.rename(previous)


def _of_rank(parts: Parts, source: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What one rank alone kept: tensors, and plain values."""
    kept = parts.read(f"rank/{source}/")
    return kept, json.loads(unpack(kept["plain"]))


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _mixed(*numbers: int) -> int:
    """One number of 31 bits of several."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "little") >> 1
