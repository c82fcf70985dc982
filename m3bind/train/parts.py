"""Tensors of many ranks in one folder: each rank writes its part, any number of them read it.

This is torch.distributed.checkpoint in its safetensors layout: one file a rank, which says where
in the whole its parts belong. No pickle is involved, so a folder from a stranger can be opened,
and what one process wrote are plain safetensors.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3bind.errors import M3BindError
from m3bind.files import unwritable


def save_parts(folder: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write ``tensors`` into ``folder``, which must be new; every rank calls it with its own.

    Equivalent to::

        from torch.distributed import checkpoint

        storage = checkpoint.HuggingFaceStorageWriter(folder, save_distributed=True)
        checkpoint.save(tensors, storage_writer=storage)

    Of a DTensor each rank writes its part; of what several ranks have under one name, one of them
    does. Returns how many there are of all ranks. Raises M3BindError, on all of them, where one
    cannot write.
    """
    from torch.distributed import checkpoint

    storage = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _one_process_is_fine():
        try:
            written: Any = checkpoint.save(_apart(tensors), storage_writer=storage)
        except checkpoint.CheckpointException as error:
            raise unwritable(folder, _failures(error)) from None
    return len(written.state_dict_metadata)


class Parts:
    """What `save_parts` wrote into ``folder``, on any number of ranks; each rank reads by itself.

    ``count`` is what `save_parts` returned. ``like`` has the shape and dtype of every tensor, in
    tensors without memory. Raises M3BindError where anything is missing or damaged.
    """

    def __init__(self, folder: Path, count: int) -> None:
        from safetensors import SafetensorError
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        self.folder = folder
        try:
            metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise M3BindError(f"{folder} is not a whole checkpoint ({error})") from None
        there = len(metadata.state_dict_metadata)
        if there != count:
            raise M3BindError(f"{folder} is not a whole checkpoint: {there} of {count} tensors")
        self.like: dict[str, Tensor] = {}
        stored: dict[str, Any] = metadata.state_dict_metadata
        for name, tensor in stored.items():
            # Parts never overlap: so many numbers are all of it.
            if sum(prod(part.sizes) for part in tensor.chunks) != prod(tensor.size):
                raise M3BindError(f"{folder} is not a whole checkpoint: it lacks a part of {name}")
            dtype = tensor.properties.dtype
            self.like[name] = torch.empty(tensor.size, dtype=dtype, device="meta")

    def under(self, prefix: str) -> list[str]:
        """The names that begin with ``prefix``, without it."""
        return [name.removeprefix(prefix) for name in self.like if name.startswith(prefix)]

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, by the rest, whole and on the CPU."""
        likes = {name: self.like[prefix + name] for name in self.under(prefix)}
        found = {name: torch.empty_like(like, device="cpu") for name, like in likes.items()}
        self.fill(prefix, found)
        return found

    def fill(self, prefix: str, tensors: Mapping[str, Tensor]) -> None:
        """Fill ``tensors``, by the rest of their names; of a DTensor this rank's part is read.

        Raises M3BindError for one that is not there or has another shape.
        """
        from torch.distributed import checkpoint

        for name, tensor in tensors.items():
            like = self.like.get(prefix + name)
            if like is None or like.shape != tensor.shape:
                there = "is missing" if like is None else f"has the shape {tuple(like.shape)}"
                raise M3BindError(
                    f"{self.folder} does not fit: {prefix}{name} {there}, and should have "
                    f"{tuple(tensor.shape)}"
                )
        named = {prefix + name: tensor for name, tensor in tensors.items()}
        storage = checkpoint.HuggingFaceStorageReader(str(self.folder))
        with _one_process_is_fine():
            try:
                checkpoint.load(named, storage_reader=storage, no_dist=True)
            except checkpoint.CheckpointException as error:
                raise M3BindError(f"cannot read {self.folder}: {_failures(error)}") from None


def pack(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def unpack(tensor: Tensor) -> bytes:
    """The inverse of `pack`."""
    return tensor.numpy().tobytes()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """None of them in another's memory, as tied weights are, which safetensors refuses."""
    used: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        own: Any = tensor.detach()
        local = own.to_local() if hasattr(own, "to_local") else own
        memory = local.untyped_storage().data_ptr()
        if memory in used or not local.is_contiguous():
            own = own.clone(memory_format=torch.contiguous_format)
        used.add(memory)
        found[name] = own
    return found


def _failures(error: Any) -> str:
    said = {rank: str(failure[0]) or repr(failure[0]) for rank, failure in error.failures.items()}
    return "; ".join(f"rank {rank}: {said[rank].splitlines()[0]}" for rank in sorted(said))


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
