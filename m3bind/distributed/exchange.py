"""All that ranks send to each other goes through here, as bytes: nothing is added up in transit.

Sums are formed by the receiver in the order of the ranks, so every rank has the same bits, and two
runs agree. Every call must be made by all ranks of the group, in the same order.
"""

from __future__ import annotations  # torch may be built without ProcessGroup

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m3bind.distributed.lost import announce, naming_the_lost
from m3bind.distributed.order import history, numbered, parted

TEXT_BYTES = 8192  # of which a character in JSON may take twelve


class Transfer:
    """Something under way; `wait` gives what has arrived."""

    def __init__(
        self, group: Any, works: Sequence[Any], sent: Sequence[Tensor], found: list[Tensor]
    ) -> None:
        self._group, self._works, self._found = group, works, found
        self._sent = sent  # must not be freed before the works end

    def wait(self) -> list[Tensor]:
        for work in self._works:
            _guarded(self._group, work.wait)
        self._works, self._sent = (), ()
        return self._found


class Channel:
    """A process group, seen from one of its ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # What is not features travels by the CPU where the group can: that costs no
        # synchronisation with a GPU.
        config = str(dist.get_backend_config(group))
        kinds = [part.partition(":")[0] for part in config.split(",")]
        self.device = torch.device("cpu" if "cpu" in kinds else kinds[0])
        self.call = 0  # its number, after the ranks have met

    def begin(self, op: str) -> None:
        announce()
        self.call = history(self.group).begin(op)

    def numbers(self, own: list[int]) -> list[list[int]]:
        """Every rank's list of equal length."""
        sent = torch.tensor(own, dtype=torch.int64, device=self.device)
        return self.stack(sent).tolist()

    def texts(self, own: dict[str, str]) -> list[dict[str, str]]:
        """Every rank's, each text cut to what fits."""
        longest = TEXT_BYTES // 16 // max(1, len(own))
        encoded = json.dumps({key: text[:longest] for key, text in own.items()}).encode()
        sent = torch.tensor(list(encoded.ljust(TEXT_BYTES)), dtype=torch.uint8, device=self.device)
        return [json.loads(bytes(found).decode()) for found in self.stack(sent).tolist()]

    def stack(self, own: Tensor) -> Tensor:  # [W, ...]
        """Every rank's tensor of equal shape."""
        found = own.new_empty(self.size, *own.shape)
        if own.numel():
            work = _guarded(
                self.group, dist.all_gather_into_tensor, _bytes(found.view(-1)),
                _bytes(own.reshape(-1)), group=self.group, async_op=True,
            )  # fmt: skip
            _guarded(self.group, work.wait)
        return found

    def start_gather(self, own: Tensor, counts: list[int]) -> Gathered:
        """Begins to collect every rank's rows [counts[rank], ...]."""
        return Gathered(self, own, counts)

    def gather(self, own: Tensor, counts: list[int]) -> Tensor:
        return self.start_gather(own, counts).wait()

    def gather_in_call(self, own: Tensor, counts: list[int]) -> Tensor:
        """`gather` of [n, C], by ranks that all are in this call, or all raise."""
        if not own.shape[1]:
            return self.gather(own, counts)
        found = self.gather(numbered(own, self.call), [count + 1 for count in counts])
        numbers, rows = parted(found, counts)
        history(self.group).met(numbers)
        return rows

    def to_owners(self, values: Tensor, counts: list[int]) -> Tensor:
        """What every rank found of this rank's columns: [W, C, m] of each rank's [C, M]."""
        rows, own = values.T.contiguous(), counts[self.rank]  # [M, C]
        found = rows.new_empty(self.size * own, rows.shape[1])
        if rows.numel():
            work = _guarded(
                self.group, dist.all_to_all_single, _bytes(found), _bytes(rows), [own] * self.size,
                counts, group=self.group, async_op=True,
            )  # fmt: skip
            _guarded(self.group, work.wait)
        return found.view(self.size, own, rows.shape[1]).transpose(1, 2)

    def pass_on(self, tensors: Sequence[Tensor], num_rows: int) -> Transfer:
        """Begins to send `tensors` to the next rank, and to receive the previous one's, of
        `num_rows` rows. No rows travel as one: NCCL wants every rank in a group's first call."""
        sent = [t.contiguous() if len(t) else t.new_zeros(1, *t.shape[1:]) for t in tensors]
        found = [t.new_empty(max(1, num_rows), *t.shape[1:]) for t in tensors]
        following = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        previous = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        operations = [dist.P2POp(dist.isend, _bytes(t), following, self.group) for t in sent]
        operations += [dist.P2POp(dist.irecv, _bytes(t), previous, self.group) for t in found]
        works = _guarded(self.group, dist.batch_isend_irecv, operations)
        return Transfer(self.group, works, sent, [t[:num_rows] for t in found])


class Gathered:
    """Rows of all ranks, under way. Uneven ones travel filled up to the longest."""

    def __init__(self, channel: Channel, own: Tensor, counts: list[int]) -> None:
        longest, self._counts = max(counts), counts
        self._found = own.new_empty(channel.size * longest, *own.shape[1:])
        sent = own.contiguous()
        if sent.shape[0] < longest:
            sent = own.new_zeros(longest, *own.shape[1:])
            sent[: own.shape[0]] = own
        works = []
        if sent.numel():
            works = [
                _guarded(
                    channel.group, dist.all_gather_into_tensor, _bytes(self._found), _bytes(sent),
                    group=channel.group, async_op=True,
                )
            ]  # fmt: skip
        self._transfer = Transfer(channel.group, works, [sent], [self._found])

    def wait(self) -> Tensor:
        (found,), longest = self._transfer.wait(), max(self._counts)
        if all(count == longest for count in self._counts):
            return found
        blocks = found.split(longest)
        return torch.cat([b[:count] for b, count in zip(blocks, self._counts, strict=True)])


def _bytes(tensor: Tensor) -> Tensor:
    """Backends differ in the dtypes that they move; all move bytes."""
    length, width = tensor.shape[0], tensor.shape[1:].numel() * tensor.element_size()
    return tensor.view(-1).view(torch.uint8).view(length, width)


def _guarded(group: Any, call: Any, /, *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except NotImplementedError:  # this rank's own mistake, not a rank that is lost
        raise
    except RuntimeError as error:
        raise naming_the_lost(error, group, "a loss") from error
