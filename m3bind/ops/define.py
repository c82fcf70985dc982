"""Registers an operator that calls the backend which its last argument names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from m3bind import backends
from m3bind.eager import eager
from m3bind.ops.tangents import Moves

_ONLY_LEVEL = 0  # torch does not nest those of forward mode


def define(
    primitive: str,
    name: str,
    signature: str,
    fake: Callable[..., Any],
    composite: Callable[..., Any] | None = None,
) -> None:
    """Registers `m3bind::<name>`, whose `signature` gets `str backend` as its last argument.

    `primitive` is its row in the table of backends. The backend travels in the schema, so that the
    backward pass, which runs on other threads, uses the one that the forward pass used. `composite`
    takes all arguments, as `fake` does, and runs in backends that have no `<name>` of their own.
    """
    arguments, arrow, results = signature.partition(") ->")

    def run(*args: Any) -> Any:
        *inputs, backend = args
        implementation = backends.implementation(primitive, backend)
        if composite is not None and not hasattr(implementation, name):
            return composite(*args)
        return getattr(implementation, name)(*inputs)

    define_plain(name, f"{arguments}, str backend{arrow}{results}", run, fake)


def define_plain(
    name: str, signature: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Registers `m3bind::<name>`, which is the same in every backend."""
    qualified = f"m3bind::{name}"
    torch.library.define(qualified, signature)
    torch.library.impl(qualified, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(qualified)(fake)
    operator = getattr(torch.ops.m3bind, name).default

    def one_by_one(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        calls = [
            [t if dim is None else t.select(dim, i) for t, dim in zip(inputs, in_dims, strict=True)]
            for i in range(info.batch_size)
        ]
        if not calls:
            raise ValueError(f"{qualified}: torch.func.vmap over no calls; pass at least one")
        found = [operator(*call) for call in calls]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return tuple(torch.stack(each) for each in zip(*found, strict=True)), (0,) * len(found[0])

    torch.library.register_vmap(qualified, one_by_one)


def differentiate(
    name: str,
    save: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    tangents: Callable[[tuple[Any, ...], Moves, Any], tuple[Tensor, ...]],
) -> None:
    """Makes `m3bind::<name>_bwd`, which has no derivative itself, that of `m3bind::<name>_fwd`.

    `tangents` is its forward mode: of the inputs, their tangents and the output, the tangents of
    the first outputs; the others have none.
    """
    _register(f"{name}_fwd", save, backward, tangents)
    _register(f"{name}_bwd", lambda *_: None, _refuse, _refuse)


def _register(
    name: str,
    save: Callable[..., None],
    backward: Callable[..., Any],
    tangents: Callable[..., Any],
) -> None:
    """torch.library.register_autograd without what it does at every call: looking at each argument
    in the schema takes longer than a small batch's matrix products."""
    operator = getattr(torch.ops.m3bind, name).default

    def below(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    def function_of(base: Any, kept: tuple[Any, ...] | None = None) -> Any:
        """An autograd function, whose backward pass gets the inputs, or `kept` instead of them."""

        def forward(ctx: Any, *inputs: Any) -> Any:
            if torch._C._are_functorch_transforms_active():
                # An autograd function turns both off: right for its own level, which is passed by
                # below, and wrong for the levels of torch.func around it.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    output = below(*inputs)
            else:
                output = below(*inputs)
            save(ctx, inputs if kept is None else kept, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(f"m3bind_{name}", (base,), methods)

    function = function_of(torch.autograd.Function)
    # torch.func calls `run` once for each of its levels, with that level's tensors.
    of_level = function_of(_SingleLevelFunction)

    def recorded(inputs: tuple[Any, ...], kept: tuple[Any, ...] | None = None) -> Any:
        """The output, with the graph that reverse mode asks for."""
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return below(*inputs)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return of_level.apply(*inputs)
        of_call = function if kept is None else function_of(torch.autograd.Function, kept)
        return of_call.apply(*inputs)

    def run(*inputs: Any) -> Any:
        if not _may_move():
            return recorded(inputs)
        primals, moves = _unpacked(inputs)
        if all(move is None for move in moves):
            return recorded(inputs)
        _Compiled.note(inputs)
        # The backward pass gets the tangents, for which it has no rule, and refuses them.
        output = recorded(primals, inputs)
        return _dual(output, tangents(primals, moves, output))

    torch.library.impl(f"m3bind::{name}", "Autograd")(eager(run))


def _may_move() -> bool:
    """Whether inputs may have tangents. A compiled function sets no level that forward_ad knows,
    which shows while it is traced, by a mode, and is remembered."""
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or _Compiled.duals
    )


class _Compiled:
    duals = False  # whether any compiled function was met in which tensors have tangents

    @classmethod
    def note(cls, inputs: tuple[Any, ...]) -> None:
        """These have tangents."""
        cls.duals |= any(isinstance(t, torch._subclasses.FakeTensor) for t in inputs)


def _unpacked(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], Moves]:
    """The inputs without their tangents, and these."""
    duals = [
        forward_ad.unpack_dual(t, level=_ONLY_LEVEL) if isinstance(t, Tensor) else (t, None)
        for t in inputs
    ]
    primals, moves = zip(*duals, strict=True)
    return primals, moves


def _dual(output: Any, moves: tuple[Tensor, ...]) -> Any:
    """The output with its tangents."""
    outputs = output if isinstance(output, tuple) else (output,)
    moved = tuple(
        forward_ad.make_dual(value, move.to(value.dtype), level=_ONLY_LEVEL)
        for value, move in zip(outputs, moves, strict=False)
    )
    return (*moved, *outputs[len(moved) :]) if isinstance(output, tuple) else moved[0]


def _refuse(*_: Any) -> Any:
    raise RuntimeError(
        "m3bind: fused operators have no second derivatives (double backward, torch.func.hessian); "
        "pass backend='reference' for them"
    )
