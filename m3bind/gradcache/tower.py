"""One tower in one step: features without a graph, then their gradients to its parameters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from m3bind.gradcache import parallel, rows
from m3bind.gradcache.replay import Generators, States, without_autocast

Name = int | str


@dataclass(kw_only=True, slots=True)
class Pass:
    where: str  # as errors call it
    tower: Callable[..., Any]
    given: Any
    spans: list[slice]
    generators: Generators
    trains: bool  # whether anything in it needs a gradient
    held: list[Any]  # modules of DDP and FSDP2 in it that the step synchronises
    doubtful: list[Any]  # those of them that other towers may call instead
    states: list[States] = field(default_factory=list)
    features: dict[Name, Any] = field(default_factory=dict)  # of all rows
    shared: set[Name] = field(default_factory=set)  # those that are the same for all rows
    grads: dict[Name, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def embed(self) -> None:
        """Fill `features`, as leaves of the loss's graph, and find out what `held` is."""
        total = self.spans[-1].stop
        with parallel.called(self.doubtful) as used:
            for part in self.spans:
                self.states.append(self.generators.states())
                found = self._call(part)
                if not self.features:
                    self._prepare(found, part, total)
                self._keep(found, part)
        self.held = [m for m in self.held if m not in self.doubtful or m in used]
        for value in self.features.values():
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                value.requires_grad_(self.trains)

    def _call(self, part: slice) -> dict[Name, Any]:
        positional, keywords = rows.arguments(rows.cut(self.given, part))
        return rows.named(self.tower(*positional, **keywords))

    def _prepare(self, found: dict[Name, Any], part: slice, total: int) -> None:
        if not any(isinstance(value, Tensor) for value in found.values()):
            raise ValueError(f"{self.where} returned no tensor: its result is what the loss takes")
        for name, value in found.items():
            if hasattr(value, "placements"):
                raise ValueError(
                    f"{self.where} returned a DTensor ({name!r}): FSDP2 gathers parameters for a "
                    "module's forward, and for a method after torch.distributed.fsdp."
                    "register_fsdp_forward_method(module, name); else return `full_tensor()`"
                )
            if isinstance(value, Tensor):
                # A scale or bias, which a module that DDP or FSDP wraps has to return itself.
                if value.dim() < 2 and value.numel() == 1:
                    if not value.untyped_storage().nbytes():
                        raise ValueError(
                            f"{self.where} returned a parameter itself ({name!r}), whose memory "
                            "FSDP2 has freed after the forward pass: return what is computed from "
                            "it, `log_scale.exp()` or `scale * 1`"
                        )
                    self.shared.add(name)
                    self.features[name] = value.detach().clone()
                elif value.dim() < 2 or len(value) != part.stop - part.start:
                    raise ValueError(
                        f"{self.where} returned a tensor of shape {tuple(value.shape)} "
                        f"({name!r}) for {part.stop - part.start} rows: features are "
                        "[rows, ...] with two dimensions or more, a scale is [] or [1]"
                    )
                else:
                    # Filled in place: joining the chunks would hold them all twice.
                    self.features[name] = value.new_empty(total, *value.shape[1:])
            elif isinstance(value, dict | list | tuple):
                raise ValueError(
                    f"{self.where} returned a {type(value).__name__} within its result ({name!r}): "
                    "wrap it in a module that returns a tensor, or a tuple or dict of tensors"
                )
            else:
                self.features[name] = value

    def _keep(self, found: dict[Name, Any], part: slice) -> None:
        if found.keys() != self.features.keys():
            raise ValueError(
                f"{self.where} returned {list(found)} for one chunk and {list(self.features)} for "
                "another: it must return the same for all"
            )
        for name, value in found.items():
            whole = self.features[name]
            if isinstance(value, Tensor) and name not in self.shared:
                want = (part.stop - part.start, *whole.shape[1:])
                if value.shape != want or value.dtype != whole.dtype:
                    raise ValueError(
                        f"{self.where} returned {value.dtype} {tuple(value.shape)} ({name!r}) for "
                        f"one chunk, where the first makes it {whole.dtype} {want}: features must "
                        "not depend on the chunk"
                    )
                whole[part] = value

    def take_gradients(self) -> None:
        """Those that the loss has left at the features, which are no longer needed themselves."""
        for name, value in self.features.items():
            if isinstance(value, Tensor) and value.requires_grad:
                if value.grad is not None:
                    self.grads[name] = value.grad
                elif self.held:  # every parameter must have one, or other ranks would wait
                    self.grads[name] = torch.zeros_like(value)
        self.features.clear()

    def replay(self, index: int) -> None:
        """Chunk `index` once more, with a graph, and back through it."""
        part, last = self.spans[index], index == len(self.spans) - 1
        self.generators.restore(self.states[index])
        found = self._call(part)
        tensors, grads = [], []
        for name, grad in self.grads.items():
            shared = name in self.shared
            if found[name].requires_grad and (last or not shared):
                tensors.append(found[name])
                grads.append(grad if shared else grad[part])
        if tensors:
            with without_autocast(t.device for t in tensors):
                torch.autograd.backward(tensors, grads)


def needs_gradient(where: str, module: nn.Module, given: Any) -> bool:
    """Whether parameters or inputs want one; inputs that others computed are refused."""
    inputs = [leaf for leaf in rows.leaves(where, given) if isinstance(leaf, Tensor)]
    for leaf in inputs:
        if leaf.requires_grad and not leaf.is_leaf:
            raise ValueError(
                f"{where} holds a tensor that has a graph behind it, and each chunk would walk it: "
                "make what computes it a part of the tower, or detach it"
            )
    return any(t.requires_grad for t in (*inputs, *module.parameters()))
