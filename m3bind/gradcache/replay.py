"""State around forward passes that run twice: random generators, autocast, running statistics."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

States = list[Tensor]


class Generators:
    """The default generators of the CPU and of the devices on which towers compute."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        kinds = ("cpu", "meta")
        self.devices = sorted({t.device for t in tensors if t.device.type not in kinds}, key=str)
        self._last: States = []

    def states(self) -> States:
        """A state is 5 KB on a CPU: chunks that draw nothing share one."""
        found = [torch.get_rng_state()]
        for device in self.devices:
            found.append(torch.get_device_module(device).get_rng_state(*_which(device)))
        if len(self._last) != len(found) or not all(map(torch.equal, self._last, found)):
            self._last = found
        return self._last

    def restore(self, states: States) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, *_which(device))

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Afterwards they go on as if the block had drawn nothing."""
        before = self.states()
        try:
            yield
        finally:
            self.restore(before)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)


@contextmanager
def without_autocast(devices: Iterable[torch.device]) -> Iterator[None]:
    """For backward passes, which run in the dtypes that the forward pass chose."""
    with ExitStack() as stack:
        for kind in {"cpu", *(device.type for device in devices)}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def batch_norms(modules: Iterable[nn.Module]) -> list[tuple[str, Any]]:
    """Layers that would give other features, or update their statistics, chunk by chunk."""
    return [
        (name or type(part).__name__, part)
        for module in modules
        for name, part in module.named_modules()
        if part.training
        and (isinstance(part, _BatchNorm)
             or (isinstance(part, _InstanceNorm) and part.track_running_stats))
    ]  # fmt: skip


@contextmanager
def kept_statistics(norms: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
    """The first forward pass has updated them, once a chunk; the second must not do it again."""
    kept = [(b, b.clone()) for _, norm in norms for b in norm.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
