"""Processes that form a gloo group and stay: a case costs milliseconds instead of their start."""

import contextlib
import io
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60
PRELOADED = [
    "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo", "m3bind.losses",
    "m3bind.tasks.align", "m3bind.tasks.distill", "m3bind.tasks.pretrain",
]  # fmt: skip


class Ranks:
    """W processes; `run(function, args of each rank)` gives what each of them returned.

    ``how`` they start: forked from one process that imports for all of them, in the environment in
    which that one was started, or "spawn", each from nothing.
    """

    def __init__(self, size: int, seconds: float = SECONDS, how: str = "forkserver") -> None:
        self.size, self.broken = size, False
        context: Any = multiprocessing.get_context(how)
        if how == "forkserver":  # heard once, before the first of them
            context.set_forkserver_preload(PRELOADED)
        port = _free_port()
        self._pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, size, port, seconds), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], arguments: list[tuple]) -> None:
        for pipe, given in zip(self._pipes, arguments, strict=True):
            pipe.send_bytes(pickle.dumps((function, given)))

    def answers(self, seconds: float = SECONDS) -> dict[int, tuple[bool, Any]]:
        """Of each rank whether it went well, and what it returned or the traceback; ranks that
        are dead, or silent for so long, are missing."""
        waiting, found = dict(enumerate(self._pipes)), {}
        end = time.monotonic() + seconds
        while waiting and (left := end - time.monotonic()) > 0:
            for pipe in wait(list(waiting.values()), left):
                rank = self._pipes.index(pipe)
                del waiting[rank]
                with contextlib.suppress(EOFError, ConnectionError):
                    found[rank] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
                if rank in found and not found[rank][0]:  # others may wait for it in vain
                    end = min(end, time.monotonic() + 5)
        return found

    def run(self, function: Callable[..., Any], arguments: list[tuple] | None = None) -> list[Any]:
        self.start(function, arguments or [()] * self.size)
        found = self.answers()
        self.broken = len(found) < self.size
        for rank, (good, value) in found.items():
            if not good:
                raise AssertionError(f"rank {rank}:\n{value}")
        assert not self.broken, f"no answer from ranks {set(range(self.size)) - found.keys()}"
        return [found[rank][1] for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(pipe: Any, rank: int, size: int, port: int, seconds: float) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:  # whoever asked is gone
            return
        try:
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        out = io.BytesIO()
        torch.save(answer, out)
        pipe.send_bytes(out.getvalue())
