"""Tensors of many ranks in one folder: each rank writes its part, any number of them read it.

This is torch.distributed.checkpoint in its safetensors layout: files of each rank, which say where
in the whole their parts belong. No pickle is involved, so a folder from a stranger can be opened,
and what one process wrote are plain safetensors.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from m3bind.errors import M3BindError
from m3bind.files import sync, unwritable
from m3bind.parallel import gathered_objects, rank

# Of a file, about. While a rank writes one it holds it three times in main memory, or twice where
# the tensors lie there already.
FILE_BYTES = 256 << 20


def save_parts(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write ``tensors`` into ``folder``, which must be new; every rank calls it with its own.

    Equivalent to::

        from torch.distributed import checkpoint

        storage = checkpoint.HuggingFaceStorageWriter(folder, save_distributed=True)
        checkpoint.save(tensors, storage_writer=storage)

    in files of about FILE_BYTES, or of one tensor. Of a DTensor each rank writes its part; of what
    several ranks have under one name, which must be the same on all of them, one does. Returns how
    many tensors there are of all ranks, and numbers in them. Raises M3BindError, on all of them,
    where one cannot write.
    """
    from torch.distributed import checkpoint

    own = _apart(tensors)
    storage = checkpoint.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_files(own), save_distributed=True
    )
    with _one_process_is_fine():
        try:
            written: Any = checkpoint.save(own, storage_writer=storage)
        except checkpoint.CheckpointException as error:
            raise _failure(folder, error) from error
    for file in folder.glob(f"shard-{rank() + 1:05d}-*"):
        sync(file)  # torch 2.11 does so before it has written the last of it
    return _extent(written.state_dict_metadata)


def _extent(stored: Mapping[str, Any]) -> dict[str, int]:
    return {"tensors": len(stored), "numbers": sum(prod(one.size) for one in stored.values())}


def _failure(folder: Path, error: Any) -> BaseException:
    failed = {number: failure for number, (failure, _) in sorted(error.failures.items())}
    if any(isinstance(one, KeyboardInterrupt) for one in failed.values()):
        return KeyboardInterrupt()
    said = "; ".join(
        f"rank {number}: {(str(one) or repr(one)).splitlines()[0]}"
        for number, one in failed.items()
    )
    if all(isinstance(one, OSError | SafetensorError) for one in failed.values()):
        return unwritable(folder, said)
    return M3BindError(f"a checkpoint could not be written to {folder}: {said}")


class Parts:
    """What `save_parts` wrote into ``folder``, on any number of ranks; each rank reads by itself.

    ``extent`` is what `save_parts` returned. ``like`` has the shape and dtype of every tensor, in
    tensors without memory. Raises M3BindError where anything is missing or cut short.
    """

    def __init__(self, folder: Path, extent: Mapping[str, int]) -> None:
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        self.folder = folder
        try:
            self.metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise M3BindError(f"{folder} is not a whole checkpoint ({error})") from None
        stored: dict[str, Any] = self.metadata.state_dict_metadata
        # What is lost of a tensor's end makes it look smaller.
        for what, found in _extent(stored).items():
            if found != extent[what]:
                raise M3BindError(
                    f"{folder} is not a whole checkpoint: {found} of {extent[what]} {what}"
                )
        self.like: dict[str, Tensor] = {}
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

        Raises M3BindError for one that is not there, or has another shape or dtype.
        """
        from torch.distributed import checkpoint

        for name, tensor in tensors.items():
            like = self.like.get(prefix + name)
            if like is None or (like.shape, like.dtype) != (tensor.shape, tensor.dtype):
                there = "is missing" if like is None else f"is {_described(like)}"
                raise M3BindError(
                    f"{self.folder} does not fit: {prefix}{name} {there}, and should be "
                    f"{_described(tensor)}"
                )
        metadata = self.metadata

        class Reader(checkpoint.HuggingFaceStorageReader):
            """Opens no file for what is known."""

            def read_metadata(self) -> Any:
                return metadata

        named = {prefix + name: tensor for name, tensor in tensors.items()}
        with _one_process_is_fine():
            try:
                checkpoint.load(named, storage_reader=Reader(str(self.folder)), no_dist=True)
            except checkpoint.CheckpointException as error:
                raise M3BindError(f"{self.folder} cannot be read: {error}") from error


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def pack(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())


def unpack(tensor: Tensor) -> bytes:
    """The inverse of `pack`."""
    return tensor.numpy().tobytes()


def _files(own: Mapping[str, Tensor]) -> dict[str, int]:
    """In which of a rank's files each tensor goes, from 1.

    Those who have a tensor write equal shares of it if it is spread, and otherwise of all such
    tensors, on average: which of them writes one is torch's choice.
    """
    of_ranks = gathered_objects({name: t.numel() * t.element_size() for name, t in own.items()})
    holders = Counter(name for sizes in of_ranks for name in sizes)
    shares = {n: size / holders[n] for sizes in of_ranks for n, size in sizes.items()}
    files, file, filled = {}, 1, 0.0
    for name, share in shares.items():
        if filled and filled + share > FILE_BYTES:
            file, filled = file + 1, 0.0
        files[name], filled = file, filled + share
    return files


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


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
