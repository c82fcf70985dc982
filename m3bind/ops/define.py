"""Registers an operator that calls the backend which its last argument names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from m3bind import backends


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
    qualified = f"m3bind::{name}"
    torch.library.define(qualified, f"{arguments}, str backend{arrow}{results}")

    def run(*args: Any) -> Any:
        *inputs, backend = args
        implementation = backends.implementation(primitive, backend)
        if composite is not None and not hasattr(implementation, name):
            return composite(*args)
        return getattr(implementation, name)(*inputs)

    torch.library.impl(qualified, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(qualified)(fake)


def differentiate(
    name: str, save: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]]
) -> None:
    """Makes `m3bind::<name>_bwd`, which has no gradient itself, that of `m3bind::<name>_fwd`."""
    _register(f"{name}_fwd", save, backward)
    _register(f"{name}_bwd", lambda *_: None, _refuse)


def _register(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """torch.library.register_autograd without what it does at every call: looking at each argument
    in the schema takes longer than a small batch's matrix products."""
    operator = getattr(torch.ops.m3bind, name).default

    def below(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            # An autograd function turns both off: right for its own level, which is passed by
            # below, and wrong for the levels of torch.func around it.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = below(*inputs)
        else:
            output = below(*inputs)
        save(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(f"m3bind_{name}", (torch.autograd.Function,), methods)
    # torch.func calls `run` once for each of its levels, with that level's tensors.
    of_level: Any = type(f"m3bind_{name}_of_level", (_SingleLevelFunction,), methods)

    def run(*inputs: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(inputs)
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        if not wanted:
            return below(*inputs)
        if not torch._C._are_functorch_transforms_active():
            return function.apply(*inputs)
        with enable_single_level_autograd_function():
            return of_level.apply(*inputs)

    torch.library.impl(f"m3bind::{name}", "Autograd")(run)


def _refuse_tangents(inputs: tuple[Any, ...]) -> None:
    """Below autograd they would be lost, and the derivative 0 without a word."""
    for value in inputs:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                "m3bind: fused operators have no forward-mode derivative (torch.func.jvp, jacfwd); "
                "pass backend='reference' for one"
            )


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "m3bind: fused operators have no double backward; pass backend='reference' for one"
    )
