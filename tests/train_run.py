"""A tiny training run on real shards, as a program that a test can kill: OUT DELAY [resume]."""

import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from m3bind.config import TrainConfig
from m3bind.data.loader import Loader
from m3bind.data.preprocess import Preprocess
from m3bind.errors import M3BindError
from m3bind.train import FitResult, fit

CONFIG = {"steps": 24, "batch_size": 4, "warmup": 4, "lr": 0.01}
EVERY = {"log_every": 1, "checkpoint_every": 3, "validate_every": 4}


class Regression(nn.Module):
    """Draws from every generator that a real task may draw from."""

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.delay = delay
        self.net = nn.Sequential(nn.Linear(256, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))

    def forward(self, batches, rng: random.Random):
        time.sleep(self.delay)
        target = rng.random() + random.random() + np.random.rand()
        losses = {
            name: (self.net(batch.images.flatten(1)) - target).square().mean()
            for name, batch in batches.items()
        }
        return losses, {"target": float(target)}

    def parameter_groups(self):
        return [{"params": list(self.net.parameters())}]

    def trainable_state(self):
        return self.state_dict()

    def load_trainable_state(self, state):
        self.load_state_dict(state)


def run(data: Path, out: Path, *, delay: float = 0.0, resume: bool = False) -> FitResult:
    torch.set_num_threads(1)
    random.seed(5)
    np.random.seed(5)
    task = Regression(delay)
    preprocess = Preprocess.for_modality("xray", size=(16, 16))
    loader = Loader(data, "xray", "train", preprocess, 4, train=True, seed=2)
    return fit(
        task, {"xray": loader}, TrainConfig(**CONFIG, **EVERY), out, seed=1, resume=resume,
        validate=lambda: {"score": float(torch.rand(()))}, description="tiny",
    )  # fmt: skip


if __name__ == "__main__":
    data_, out_, delay_, *resume_ = sys.argv[1:]
    try:
        run(Path(data_), Path(out_), delay=float(delay_), resume=bool(resume_))
    except M3BindError as error:
        print(error)
        sys.exit(3)
