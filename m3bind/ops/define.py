"""Registers an operator that calls the backend which its last argument names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m3bind import backends


def define(primitive: str, name: str, signature: str, fake: Callable[..., Any]) -> None:
    """Registers `m3bind::<name>`, whose `signature` gets `str backend` as its last argument.

    `primitive` is its row in the table of backends. The backend travels in the schema, so that the
    backward pass, which runs on other threads, uses the one that the forward pass used.
    """
    arguments, arrow, results = signature.partition(") ->")
    qualified = f"m3bind::{name}"
    torch.library.define(qualified, f"{arguments}, str backend{arrow}{results}")

    def run(*args: Any) -> Any:
        *inputs, backend = args
        return getattr(backends.implementation(primitive, backend), name)(*inputs)

    torch.library.impl(qualified, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(qualified)(lambda *args: fake(*args[:-1]))


def differentiate(
    name: str, save: Callable[..., None], backward: Callable[..., tuple[Tensor | None, ...]]
) -> None:
    """Makes `m3bind::<name>_bwd`, which has no gradient itself, that of `m3bind::<name>_fwd`."""
    torch.library.register_autograd(f"m3bind::{name}_fwd", backward, setup_context=save)
    torch.library.register_autograd(f"m3bind::{name}_bwd", _refuse)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "m3bind: fused operators have no double backward; pass backend='reference' for one"
    )
