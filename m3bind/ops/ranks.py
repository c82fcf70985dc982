"""What a loss asks of a batch that is spread over ranks, and the answers where there is one rank.

`clip_loss`, `siglip_loss` and `similarity_distill` are composed once. What reaches over the batch
(the pairs, the statistics, sums by column, the mean) they ask of such an object; over several ranks
`m3bind.distributed` answers.
"""

from typing import Protocol

from torch import Tensor

from m3bind import reference
from m3bind.ops import pairs, stats
from m3bind.ops.listed import listed_dots

Losses = list[tuple[Tensor, Tensor]]  # of each direction: the losses, and which of them count


class Ranks(Protocol):
    """n and m are this rank's numbers of rows and columns, N and M those of all ranks."""

    def totals(self, x: Tensor, y: Tensor) -> tuple[int, int]:
        """N and M."""

    def all_rows(self, own: Tensor) -> Tensor:
        """The values [N, ...] of all rows, of the [n, ...] of this rank's."""

    def all_columns(self, own: Tensor) -> Tensor: ...

    def own_rows(self, values: Tensor) -> Tensor:
        """This rank's part [n] of values [N]."""

    def own_columns(self, values: Tensor) -> Tensor: ...

    def diagonal(self, x: Tensor, y: Tensor) -> pairs.Pairs:
        """Row i and column i of each rank are positive."""

    def negatives(self, values: Tensor) -> int:
        """How many further columns all rows have."""

    def similarity_stats(
        self,
        x: Tensor,  # [n, D]
        y: Tensor,  # [m, D]
        logit_scale: Tensor,  # []
        which: pairs.Pairs,  # of [N] and [M]
        *,
        margin: float = 0.0,
        totals: bool = False,
        kept_rows: int = 0,
        backend: str,
    ) -> tuple[Tensor, Tensor]:  # [3, n], [3, m]
        """`m3bind.ops.stats`: rows over all columns, columns over all rows."""

    def extra_stats(
        self, x: Tensor, y: Tensor, logit_scale: Tensor, *, totals: bool, backend: str
    ) -> Tensor:  # [3, n]
        """Those of the rows over further columns, which `negatives` counts."""

    def listed_dots(self, x: Tensor, y: Tensor, columns: Tensor) -> Tensor:
        """Dot products [n, K] of the rows with the columns [n, K] that each lists, of [M]."""

    def column_sums(self, values: Tensor) -> Tensor:
        """This rank's part [m] of the sum over ranks of values [M]."""

    def maximum(self, values: Tensor) -> Tensor:
        """The largest over ranks of values [M]; no gradient."""

    def reduce(self, losses: Losses, reduction: str) -> Tensor | tuple[Tensor, Tensor]: ...


class OneRank:
    """A batch in one piece."""

    def totals(self, x: Tensor, y: Tensor) -> tuple[int, int]:
        return x.shape[0], y.shape[0]

    def all_rows(self, own: Tensor) -> Tensor:
        return own

    all_columns = own_rows = own_columns = all_rows

    def diagonal(self, x: Tensor, y: Tensor) -> pairs.Pairs:
        return pairs.diagonal(x.shape[0], y.shape[0], x.device)

    def negatives(self, values: Tensor) -> int:
        return values.shape[-2]

    similarity_stats = staticmethod(stats.similarity_stats)

    def extra_stats(
        self, x: Tensor, y: Tensor, logit_scale: Tensor, *, totals: bool, backend: str
    ) -> Tensor:
        which = pairs.Pairs()
        return stats.similarity_stats(x, y, logit_scale, which, totals=totals, backend=backend)[0]

    listed_dots = staticmethod(listed_dots)

    def column_sums(self, values: Tensor) -> Tensor:
        return values

    maximum = column_sums
    reduce = staticmethod(reference.reduce)


ONE_RANK = OneRank()
