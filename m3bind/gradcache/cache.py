"""The step over all towers."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from m3bind.gradcache import parallel, rows
from m3bind.gradcache.replay import (
    Generators,
    batch_norms,
    kept_statistics,
    without_autocast,
)
from m3bind.gradcache.tower import Pass, needs_gradient

BATCH_NORM = ("error", "chunk")


class GradCache:
    """Any number of towers, one loss, and the activations of one chunk of one tower at a time.

    `step` is equivalent, to rounding, to::

        features = [
            torch.cat([tower(part) for part in batch.split(chunk)])
            for tower, batch in zip(towers, inputs)
        ]
        loss_value = loss(*features)
        loss_value.backward()

    Every chunk goes through its tower twice: without a graph, for the features of the whole batch;
    and, when the loss has left its gradients at these features, with a graph through which they go
    back, the last tower's first. The second time draws the same random numbers (dropout). In memory
    are the features of the whole batch, their gradients and the loss; then the activations of one
    chunk, and the gradients of features whose towers are to come: least, where the tower with the
    largest activations is the first.

    Args:
        towers: nn.Modules, bound methods of nn.Modules, or functools.partial of either. One may
            stand for several inputs. Towers that need no gradient run once.
        loss: takes what the towers return, in their order: a tensor or the items of a tuple one by
            one, the items of a dict by name. Returns a scalar, or a tuple or dict of scalars, whose
            sum is minimised. Losses over ranks are those of `m3bind.distributed`.
        chunk: rows that a tower takes at once; one number, or one for each tower.
        batch_norm: "error" refuses towers with batch norm in training mode, whose features would
            depend on the chunk. "chunk" lets it normalise over each chunk: what the equivalent
            above computes. Running statistics are then updated once for each chunk, not twice.

    What a tower returns: a tensor [rows, ...] of two dimensions or more, or a flat tuple or dict
    of such. Tensors [] and [1] are the same for all rows, as a scale is; they get their gradient
    once. Other values are those of the first chunk.

    DDP and FSDP2 synchronise gradients once a step: in the last chunk of the first tower in which a
    module takes part. A parameter that they hold must be used within their forward pass: return a
    scale from it; one that is used in `loss` alone is synchronised by whatever wraps the loss, or
    by `reduce_scale=True`. Ranks may hold different numbers of rows, and none. Where parameters are
    sharded, ranks agree on the number of chunks by one small collective a step, and FSDP2 keeps the
    unsharded gradients of its modules until they are synchronised.

    Autocast around `step` holds for towers and loss, not for the backward pass. CPU's and devices'
    default generators are restored, others (torch.Generator, random, numpy) are not; nor is what a
    tower changes in itself while it computes, as spectral norm does.

    Raises:
        ValueError: arguments that do not fit, each with what would. Over ranks, what is wrong on
            one of them alone ends that one; the others wait for it until their group's timeout.
            What a loss of `m3bind.distributed` finds wrong, all ranks raise.

    Source: Gao et al. 2021, Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup, arXiv:2101.06983.
    """

    def __init__(
        self,
        towers: Iterable[Callable[..., Any]],
        loss: Callable[..., Any],
        chunk: int | Iterable[int],
        *,
        batch_norm: str = "error",
    ) -> None:
        if callable(towers) and not isinstance(towers, nn.ModuleList):
            raise ValueError(f"towers is one {type(towers).__name__}: pass a list, [tower]")
        self.towers = list(towers)
        if not self.towers:
            raise ValueError("towers is empty: pass at least one")
        self.modules = [parallel.owner(f"towers[{i}]", t) for i, t in enumerate(self.towers)]
        if not callable(loss):
            raise ValueError(f"loss is a {type(loss).__name__}: pass what takes the features")
        if batch_norm not in BATCH_NORM:
            raise ValueError(f"batch_norm={batch_norm!r}: choose one of {', '.join(BATCH_NORM)}")
        self.loss, self.batch_norm = loss, batch_norm
        many = isinstance(chunk, Iterable)
        self.chunks: list[Any] = list(chunk) if many else [chunk] * len(self.towers)  # type: ignore
        if len(self.chunks) != len(self.towers):
            raise ValueError(
                f"chunk has {len(self.chunks)} numbers for {len(self.towers)} towers: pass one "
                "number, or one for each"
            )
        for number in self.chunks:
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"chunk={number!r}: rows are counted from 1")

    def step(self, *inputs: Any, scaler: Any = None, sync: bool = True, **given: Any) -> Any:
        """Add the gradients of one batch to the parameters'; returns the loss, without its graph.

        Like `loss.backward()`, it neither clears gradients before nor steps an optimizer after: a
        second call accumulates.

        Args:
            inputs: one for each tower, of this rank: a tensor or a list of strings, which is its
                argument; a tuple of its positional arguments; or a dict of its named ones. These
                may be nested. All tensors are cut along their first dimension; what has none (an
                option, None) is passed as it is. Towers may have different numbers of rows.
            scaler: a torch.amp.GradScaler, whose factor the gradients then hold: follow with
                `scaler.step(optimizer)` and `scaler.update()`.
            sync: False leaves gradients unsynchronised, for all but the last of several calls that
                accumulate.
            given: further arguments of the loss, by name (labels, ids).
        """
        if not torch.is_grad_enabled():
            raise ValueError("GradCache.step computes gradients: call it outside torch.no_grad()")
        passes = self._passes(inputs)
        norms = self._norms()
        # Whatever surrounds the step may have cast weights, and an optimizer changed them since.
        torch.clear_autocast_cache()
        for each in passes:
            each.embed()
        # It holds weights that were cast without a graph.
        torch.clear_autocast_cache()
        found = self._loss_of(passes, given)
        total = _total(found)
        if not total.requires_grad:
            raise ValueError(
                "the loss needs no gradient: no tower has a parameter that requires one, or the "
                "loss does not depend on the features"
            )
        found = _detached(found)
        with without_autocast([total.device]):
            (total if scaler is None else scaler.scale(total)).backward()
        del total
        self._back(passes, norms, sync)
        return found

    def _passes(self, inputs: tuple) -> list[Pass]:
        if len(inputs) != len(self.towers):
            raise ValueError(
                f"step got {len(inputs)} inputs for {len(self.towers)} towers: pass one for each "
                "(a tuple, if a tower takes several arguments)"
            )
        names = [f"inputs[{i}]" for i in range(len(inputs))]
        counts = [rows.count(name, given) for name, given in zip(names, inputs, strict=True)]
        numbers = [rows.chunks(n, chunk) for n, chunk in zip(counts, self.chunks, strict=True)]
        numbers = parallel.agreed(numbers, self.modules)
        tensors: list[Tensor] = [t for m in self.modules for t in m.parameters()]
        tensors += [t for v in inputs for t in rows.leaves("inputs", v) if isinstance(t, Tensor)]
        generators = Generators(tensors)
        trains = [needs_gradient(*each) for each in zip(names, self.modules, inputs, strict=True)]
        held = [
            parallel.synchronising(f"towers[{i}]", module) if trains[i] else []
            for i, module in enumerate(self.modules)
        ]
        doubtful = parallel.doubtful(self.modules, held)
        return [
            Pass(
                where=f"towers[{i}]",
                tower=tower,
                given=inputs[i],
                spans=rows.spans(counts[i], self.chunks[i], numbers[i]),
                generators=generators,
                trains=trains[i],
                held=held[i],
                doubtful=doubtful[i],
            )
            for i, tower in enumerate(self.towers)
        ]

    def _norms(self) -> list[tuple[str, Any]]:
        norms = batch_norms(dict.fromkeys(self.modules))
        for name, norm in norms:
            if isinstance(norm, nn.SyncBatchNorm):
                raise ValueError(
                    f"{name} is a SyncBatchNorm in training mode: chunks of different ranks do not "
                    "meet; call .eval() on it, or use a batch norm of this rank"
                )
            if self.batch_norm == "error":
                raise ValueError(
                    f"{name} is a {type(norm).__name__} in training mode: features would depend on "
                    "the chunk; call .eval() on it, use a norm of each row, or pass "
                    "batch_norm='chunk' to normalise over chunks"
                )
        return norms

    def _loss_of(self, passes: list[Pass], given: dict[str, Any]) -> Any:
        positional: list[Any] = []
        keywords = dict(given)
        for each in passes:
            for name, value in each.features.items():
                if isinstance(name, int):
                    positional.append(value)
                elif name in keywords:
                    raise ValueError(
                        f"{each.where} returned {name!r}, which the loss gets from elsewhere too: "
                        "give it another name"
                    )
                else:
                    keywords[name] = value
        return self.loss(*positional, **keywords)

    def _back(self, passes: list[Pass], norms: list[tuple[str, Any]], sync: bool) -> None:
        for each in passes:
            each.take_gradients()
        # The last tower first, as autograd would: beside the first one's activations, the largest
        # as a rule, only its own features' gradients are left.
        order = passes[::-1]
        last = {module: place for place, each in enumerate(order) for module in each.held}
        with ExitStack() as stack:
            stack.enter_context(kept_statistics(norms))
            stack.enter_context(passes[0].generators.unmoved())
            for place, each in enumerate(order):
                if not each.grads:
                    continue
                for index in range(len(each.spans)):
                    ends = sync and index == len(each.spans) - 1
                    waiting = [m for m in each.held if not (ends and last[m] == place)]
                    with parallel.unsynchronised(waiting):
                        each.replay(index)
                each.grads.clear()
        # An optimizer will change the weights: where one autocast block surrounds several steps,
        # the next would embed with these.
        torch.clear_autocast_cache()


def _parts(found: Any) -> list[Any]:
    if isinstance(found, Mapping):
        return list(found.values())
    return list(found) if isinstance(found, tuple | list) else [found]


def _total(found: Any) -> Tensor:
    parts = _parts(found)
    for part in parts:
        if not isinstance(part, Tensor) or part.numel() != 1:
            shape = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"the loss returned {shape}: return a scalar, or a tuple or dict of scalars, whose "
                "sum is minimised"
            )
    if not parts:
        raise ValueError("the loss returned nothing: return a scalar, or a tuple or dict of them")
    return torch.stack([part.reshape(()) for part in parts]).sum()


def _detached(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {name: value.detach() for name, value in found.items()}
    if isinstance(found, tuple | list):
        return tuple(value.detach() for value in found)
    return found.detach()
