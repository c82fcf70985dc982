"""A task of one weight, and numbered batches for it: what tests of the loop train."""

import random

import torch
from torch import nn

from m3bind.config import TrainConfig
from m3bind.data.loader import Batch
from m3bind.train.index import read_checkpoint
from m3bind.train.parts import Parts


class StubLoader:
    """Numbered batches of one number, with the interface of a loader."""

    def __init__(self) -> None:
        self.number = 0

    def __iter__(self):
        while True:
            self.number += 1
            images = torch.full((1, 1), float(self.number))
            yield Batch(images=images, reports=["r"], meta=[{}], modality="stub")

    def state(self) -> dict:
        return {"stream": bytes([self.number]), "batches": self.number, "signature": "s"}

    def load_state(self, state: dict) -> None:
        self.number = state["stream"][0]


class Stub(nn.Module):
    """One weight; ``function`` makes the losses of it and the batch's number."""

    def __init__(self, function) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.function = function
        self.modes: list[bool] = []

    def forward(self, batches, rng: random.Random):
        self.modes.append(self.training)
        return self.function(self.weight, batches["stub"].images.item()), {"note": 1.0}

    def parameter_groups(self):
        return [{"params": [self.weight]}]

    def trainable_state(self):
        return {"weight": self.weight}

    def load_trainable_state(self, state):
        if set(state) != {"weight"}:
            raise ValueError(f"unexpected keys {sorted(state)}")
        self.weight.data.copy_(state["weight"])


def quadratic(weight, number):
    return {"a": (weight**2).sum(), "b": ((weight - 3) ** 2).sum()}


def config(**values) -> TrainConfig:
    common = {"steps": 10, "warmup": 2, "lr": 0.1, "log_every": 1, "checkpoint_every": 4,
              "validate_every": 3}  # fmt: skip
    return TrainConfig(**{**common, **values})


def kept(out, which: str = "last", folder: str = "checkpoints") -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint of the run in ``out``."""
    found = read_checkpoint(out)[which]
    return Parts(out / folder / found["folder"], found).read("")
