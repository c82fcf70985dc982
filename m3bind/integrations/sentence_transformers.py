"""sentence-transformers' MultipleNegativesRankingLoss without its matrices of scores."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor

from m3bind import distributed, ops
from m3bind.dtypes import accumulation_dtype
from m3bind.ops.direction import SOFTPLUS_LINEAR

SIMILARITIES = (cos_sim, dot_score)
# The arguments that the loss below takes into account; a later release may have more.
KNOWN = (
    "self", "model", "scale", "similarity_fct", "gather_across_devices", "directions",
    "partition_mode", "hardness_mode", "hardness_strength",
)  # fmt: skip
# A sum of nothing: -inf, but with a gradient of 0 instead of NaN.
NOTHING = -1e30


class MultipleNegativesRankingLoss(theirs.MultipleNegativesRankingLoss):
    """Drop-in for sentence-transformers' class that never holds the scores of all pairs.

    Equivalent to::

        scores = scale * cos_sim(anchors, torch.cat([positives, *negatives]))
        return F.cross_entropy(scores, torch.arange(len(anchors)))

    Arguments, inputs, directions, partition and hardness modes are those of sentence-transformers
    6.2: columns (anchor, positive, negative_1, ..., negative_n), each anchor against the positives
    and negatives of the whole batch. With `gather_across_devices` the batch is that of all ranks,
    as is the mean, and gradients are those that DDP averages (`m3bind.distributed`). Scores are
    float32 also where embeddings are 16-bit.

    Raises:
        ValueError: what theirs raises; a `similarity_fct` other than `cos_sim` and `dot_score` of
            `sentence_transformers.util`; an argument of a later release.
    """

    @functools.wraps(theirs.MultipleNegativesRankingLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        signature = inspect.signature(theirs.MultipleNegativesRankingLoss.__init__)
        for name, value in signature.bind(self, *args, **kwargs).arguments.items():
            if name not in KNOWN and value != signature.parameters[name].default:
                raise ValueError(
                    f"MultipleNegativesRankingLoss: {name}={value!r} is an argument of a later "
                    "sentence-transformers than this version knows; leave it out, or use theirs"
                )
        if self.similarity_fct not in SIMILARITIES:
            raise ValueError(
                f"MultipleNegativesRankingLoss: similarity_fct={self.similarity_fct!r} needs the "
                "matrix of scores; pass cos_sim or dot_score of sentence_transformers.util, or use "
                "sentence-transformers' loss"
            )

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        if len(embeddings) < 2:
            raise ValueError(
                f"MultipleNegativesRankingLoss: {len(embeddings)} columns of texts; pass at least "
                "two: anchors and positives"
            )
        if self.similarity_fct is cos_sim:
            embeddings = [F.normalize(column, dim=-1) for column in embeddings]
        one_direction = set(self.directions) == {"query_to_doc"}
        if not self._hardness() and (one_direction or self.partition_mode == "per_direction"):
            clip_loss = distributed.clip_loss if self.gather_across_devices else ops.clip_loss
            loss = clip_loss(
                embeddings[0],
                torch.cat(embeddings[1:]),
                self.scale,
                directions="rows" if one_direction else "both",
            )
            assert isinstance(loss, Tensor)
            return loss
        return self._general_loss(*embeddings)

    def _hardness(self) -> float:
        return self.hardness_strength if self.hardness_mode is not None else 0.0

    def _general_loss(
        self,
        queries: Tensor,  # [B, D]
        positives: Tensor,  # [B, D]
        *negatives: Tensor,  # each [B, D]
    ) -> Tensor:
        """Log-sum-exps of what each positive competes with, part by part. The positive joins last:
        it would have to be subtracted again from sums that it dominates."""
        docs = torch.cat([positives, *negatives])
        own = torch.arange(len(queries), device=queries.device)
        similarity_lse: Callable[..., tuple[Tensor, Tensor]] = ops.similarity_lse
        mean: Callable[[Tensor], Tensor] = torch.mean
        if self.gather_across_devices and distributed.world_size() > 1:
            similarity_lse, mean = distributed.similarity_lse, distributed.mean
            own = own + (torch.distributed.get_rank() << 32)  # other ranks have other ids
        own_docs = own.repeat(1 + len(negatives))

        def lse(x: Tensor, y: Tensor, y_ids: Tensor, factor: float = 1.0) -> list[Tensor]:
            sums = similarity_lse(x, y, self.scale * factor, row_ids=own, col_ids=y_ids)
            return [part.clamp(min=NOTHING) for part in sums]

        harder = self._hardness() if self.hardness_mode != "hard_negatives" else 0.0
        # scale * s + harder * stop_gradient(s) is (scale + harder) * s, whose gradients are too
        # large by one factor for all of them.
        factor = 1 + harder / float(torch.as_tensor(self.scale).detach())
        to_docs, from_docs = lse(queries, docs, own_docs, factor)
        if harder:
            to_docs = to_docs.detach() + (to_docs - to_docs.detach()) / factor
        of_query = [to_docs, *(self._own_negative(queries, column) for column in negatives)]
        of_doc = []
        if "query_to_query" in self.directions:
            of_query.append(lse(queries, queries, own)[0])
        if "doc_to_query" in self.directions:
            to_queries = lse(positives, queries, own)[0] if harder else from_docs[: len(queries)]
            of_doc.append(to_queries)
        if "doc_to_doc" in self.directions:
            of_doc.append(lse(positives, docs, own_docs)[0])
        positive = self.scale * _pairwise(queries, positives)
        if self.partition_mode == "joint":
            # The positive is in the sum once for each direction that holds it.
            copies = 1 + ("doc_to_query" in self.directions)
            return mean(_competition(of_query + of_doc, positive, copies))
        return mean(
            torch.stack([_competition(parts, positive, 1) for parts in (of_query, of_doc) if parts])
        )

    def _own_negative(self, queries: Tensor, negatives: Tensor) -> Tensor:  # [B]
        """Scores of the queries with one negative each that was given for them."""
        harder = self._hardness() if self.hardness_mode != "in_batch_negatives" else 0.0
        similarity = _pairwise(queries, negatives)
        return self.scale * similarity + harder * similarity.detach()


def _pairwise(x: Tensor, y: Tensor) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    return (x.to(dtype) * y.to(dtype)).sum(1)


def _competition(parts: list[Tensor], positive: Tensor, copies: int) -> Tensor:
    """log(copies * exp(positive) + exp(parts[0]) + ...) - positive, without cancellation."""
    others = torch.stack(parts).logsumexp(0) - positive
    constant = math.log(copies)
    return constant + F.softplus(others - constant, threshold=SOFTPLUS_LINEAR)
