"""Tasks on small experts, as each rank runs its part of them, and one process the whole."""

import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from m3bind import files
from m3bind.config import AlignConfig, DistillConfig
from m3bind.data.preprocess import Preprocess
from m3bind.errors import M3BindError
from m3bind.models.expert import Expert
from m3bind.models.heads import Head, seeded
from m3bind.models.image import ImageTower
from m3bind.models.text import TextEncoder, TextTower
from m3bind.parallel import Engine, Placement, gathered_objects, meet_after, rank
from m3bind.parallel.world import claimed_by_first
from m3bind.tasks.align import Align
from m3bind.tasks.distill import Distill
from m3bind.tasks.pretrain import Pretrain
from m3bind.train import parts
from m3bind.train.checkpoints import Checkpoints
from m3bind.train.index import Progress
from m3bind.train.parts import Parts, save_parts

WIDTH = 8
ROWS = {"xray": 7, "ct": 5, "ecg": 6}
CENTRE = ["heart failure", "Normal", "tumour of the lung", "atrial fibrillation", "normal"]
WORDS = ("heart", "lung", "nodule", "effusion", "normal", "rhythm", "large", "clear")


class Nested(nn.Module):
    """A layer with a list of its own, as windowed towers have."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(26, 26) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x).tanh()
        return x


class Text(TextTower):
    """Counts of letters, through two layers of a list, as FSDP2 spreads them."""

    width = 26

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(26, 26), Nested()])

    def forward(self, texts: list[str], device: torch.device) -> Tensor:
        counts = [[t.lower().count(chr(97 + i)) for i in range(26)] for t in texts]
        found = torch.tensor(counts, dtype=torch.float32, device=device)
        for layer in self.layers:
            found = layer(found).tanh()
        return found


class Image(ImageTower):
    def __init__(self) -> None:
        super().__init__(Preprocess(kind="image2d", size=(4, 4), channels=1), 16)
        self.layer = nn.Linear(16, 16)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1)).tanh()


def encoder(name: str) -> TextEncoder:
    torch.manual_seed(sum(map(ord, name)))
    return TextEncoder(Text(), Head(26, WIDTH, seeded(name, "text")))


def expert(name: str) -> Expert:
    text = encoder(name)
    return Expert(name, Image(), Head(16, WIDTH, seeded(name, "image")), text)


def batch(name: str) -> SimpleNamespace:
    """The whole one, with two reports of one impression; of xray the last sample is the first."""
    rng, rows = random.Random(name), ROWS[name]
    reports = [
        f"FINDINGS: {rng.choice(WORDS)} {rng.choice(WORDS)} {i}.\nIMPRESSION: {WORDS[i % 4]}."
        for i in range(rows)
    ]
    images = torch.randn(rows, 1, 4, 4, generator=seeded(name, "images"))
    meta = [{"id": str(i % (rows - (name == "xray")))} for i in range(rows)]
    return SimpleNamespace(images=images, reports=reports, meta=meta)


def task_of(kind: str, placement: Placement) -> nn.Module:
    experts = {name: expert(name) for name in placement.own}
    if kind == "pretrain":
        return Pretrain(experts["xray"])
    if kind == "distill":
        return Distill(encoder("student"), experts, DistillConfig(), placement)
    agreement, _, kept = kind.partition("+")
    config = AlignConfig(
        agreement=agreement, agreement_weight=2.0, centre_batch=9, preserve_weight=float(bool(kept))
    )
    task = Align(experts, CENTRE, config, placement)
    if kept:  # somewhere else than where it began
        with torch.no_grad():
            for name in placement.own:
                experts[name].text.head.weight.mul_(1 + torch.linspace(-0.5, 0.5, 26))
    return task


def step(
    kind: str, how: str, placing: str, micro: int = 1, evaluate: Callable | None = None
) -> dict[str, Any]:
    """Losses, the report and every gradient (on the first rank) of one step."""
    names = ["xray"] if kind == "pretrain" else list(ROWS)
    placement = Placement.of(names, placing)
    task = task_of(kind, placement)
    engine = Engine(task, how, None if kind == "distill" else placement.group)
    own = {name: batch(name) for name in placement.own}
    for name, whole in own.items():
        part = placement.share(ROWS[name])
        own[name] = SimpleNamespace(**{key: value[part] for key, value in vars(whole).items()})
    if evaluate is not None:
        engine.whole(lambda: evaluate(task))
    rng = random.Random(1)
    for turn in range(micro):
        with engine.accumulating(last=turn == micro - 1):
            losses, report = engine(own, rng)
            (sum(losses.values()) / micro).backward()
    gradients = {n: p.grad for n, p in task.named_parameters() if p.grad is not None}
    norm = engine.gradient_norm(task.parameters())
    if evaluate is not None:
        engine.whole(lambda: evaluate(task))
    return {
        "losses": {name: float(value.detach()) for name, value in losses.items()},
        "report": report,
        "gradients": put_together(gradients),
        "norm": float(norm),
        "drawn": rng.random(),
        "own": "all" if kind == "distill" else ",".join(placement.own),
    }


def step_between_evaluations(kind: str, how: str, placing: str) -> dict[str, Any]:
    """Each rank calls encoders, not the task, and as often as its number."""

    def evaluate(task: Any) -> None:
        with torch.no_grad():
            for turn in range(1 + rank()):
                encoders = [task.student] if kind == "distill" else task.experts.values()
                assert all(e.encode_text([f"text {turn}"]).isfinite().all() for e in encoders)

    return step(kind, how, placing, evaluate=evaluate)


def put_together(own: dict[str, Any]) -> dict[str, Tensor]:
    """Spread tensors put together, those of every rank."""
    put = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in own.items()}
    return {name: tensor for part in gathered_objects(put) for name, tensor in part.items()}


def write_parts(
    folder: Path, how: str, placing: str, file_bytes: int = parts.FILE_BYTES
) -> dict[str, int]:
    """The trained state of a task, and what is this rank's alone."""
    placement = Placement.of(list(ROWS), placing)
    engine = Engine(task_of("mse+kept", placement), how, placement.group)
    own = {f"model/{name}": tensor for name, tensor in engine.task.trainable_state().items()}
    with mock.patch.object(parts, "FILE_BYTES", file_bytes):
        return save_parts(folder, own | {f"rank/{rank()}": torch.tensor(rank())})


def write_parts_without_space(folder: Path) -> dict[str, int]:
    """On rank 1 no file may grow beyond a few bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        return write_parts(folder, "ddp", "replicated")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Normed(nn.Module):
    """A batch norm, whose statistics are each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.BatchNorm1d(5)])

    def trainable_state(self) -> dict[str, Tensor]:
        return self.state_dict()

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(state)


def save_statistics(out: Path, how: str, resumed: bool) -> dict[str, Tensor]:
    """Those of a batch norm that this rank has, after its number was put in and they were saved or,
    where ``resumed``, read."""
    torch.manual_seed(0)
    engine = Engine(Normed(), how)
    optimizer = torch.optim.AdamW(engine.task.parameters())
    kept = Checkpoints(out, engine, optimizer, {}, random.Random(0), {"seed": 0})
    if resumed:
        kept.begin(resume=True)
        kept.load_best()
    else:
        for buffer in engine.task.buffers():
            buffer.fill_(rank() + 1)
        kept.save(Progress())
    return {name: buffer.clone() for name, buffer in engine.task.named_buffers()}


def headers_read(out: Path) -> int:
    """How often this rank reads the headers of all files, going on from `save_statistics`: once for
    the last and once for the best weights."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader as Reader

    read = mock.Mock(wraps=Reader.read_metadata)
    with mock.patch.object(Reader, "read_metadata", lambda reader: read(reader)):
        save_statistics(out, "ddp", True)
    return read.call_count


def read_parts(folder: Path, extent: dict[str, int], how: str, placing: str) -> dict[str, Tensor]:
    """What a task has that takes what `write_parts` wrote, whole."""
    placement = Placement.of(list(ROWS), placing)
    engine = Engine(task_of("mse", placement), how, placement.group)
    own = {name: t.detach() for name, t in engine.task.trainable_state().items()}
    Parts(folder, extent).fill("model/", own)
    return put_together(own)


def arrivals(*seconds: float) -> list[tuple[float, float]]:
    """When this rank had done its work, and when it went on with the others."""
    found = []
    for needed in seconds:
        time.sleep(needed)
        done = time.time()
        meet_after("work of a test")
        found.append((done, time.time()))
    return found


def claim(folder: Path) -> str:
    with mock.patch.object(files, "_WAIT", 0.2):
        try:
            with claimed_by_first(folder):
                return "mine"
        except M3BindError as error:
            return str(error)
