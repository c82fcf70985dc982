"""Losses as modules, with open_clip's signatures."""

from typing import Any

from torch import Tensor, nn

from m3bind import distributed, ops


class _OverRanks:
    """Which ranks hold the batch: open_clip's `world_size` above 1, or a group."""

    def __init__(
        self, name: str, world_size: int, group: Any, scheme: str, sizes: str, reduce_scale: bool
    ) -> None:
        self.name, self.world_size, self.group = name, world_size, group
        self.how = {"scheme": scheme, "sizes": sizes, "reduce_scale": reduce_scale}

    def options(self) -> dict[str, Any] | None:
        """Arguments of m3bind.distributed; None: the batch is in one piece."""
        if self.group is not None:
            return self.how | {"group": self.group}
        if self.world_size == 1:
            return None
        ranks = distributed.world_size()
        if ranks != self.world_size:
            raise ValueError(
                f"{self.name}: world_size={self.world_size}, but torch.distributed has {ranks} "
                "ranks; initialise its process group, or pass the `group` that holds the batch"
            )
        return self.how


def _no_horovod(name: str, use_horovod: bool, world_size: int) -> None:
    if use_horovod and world_size > 1:
        raise ValueError(
            f"{name}: use_horovod=True with world_size={world_size}: ranks exchange features by "
            "torch.distributed; pass use_horovod=False, or use open_clip's loss"
        )


class ClipLoss(nn.Module):
    """Drop-in for `open_clip.ClipLoss` that holds no more of the N x N logits than
    ``memory_budget``.

    Equivalent to::

        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Constructor and forward take what open_clip 3.3.0's take. With `world_size` above 1, or a
    `group`, the loss is that of the batch of all its ranks, with the gradients that DDP and FSDP
    average (`m3bind.distributed` says how, and what `group`, `scheme`, `sizes` and `reduce_scale`
    are): what open_clip computes with `gather_with_grad`. `local_loss`, `gather_with_grad` and
    `cache_labels` are accepted and have nothing to do. Logits are formed in float32 also from
    16-bit features, and under autocast. For shapes, dtypes, errors and `memory_budget` (MiB that
    save a matrix product) see `m3bind.ops.clip_loss`.

    Raises:
        ValueError: horovod over several ranks; in forward, a world_size that the default process
            group does not have.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        memory_budget: float | None = None,
        backend: str | None = None,
        group: Any = None,
        scheme: str = "auto",
        sizes: str = "exchange",
        reduce_scale: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _no_horovod(name, use_horovod, world_size)
        self.over_ranks = _OverRanks(name, world_size, group, scheme, sizes, reduce_scale)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.memory_budget = memory_budget
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,  # [] or [1], already exponentiated
        logit_bias: Tensor | float | None = None,  # [] or [1]
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        given: dict[str, Any] = {
            "logit_bias": logit_bias, "memory_budget": self.memory_budget, "backend": self.backend,
        }  # fmt: skip
        over = self.over_ranks.options()
        if over is None:
            loss = ops.clip_loss(image_features, text_features, logit_scale, **given)
        else:
            loss = distributed.clip_loss(
                image_features, text_features, logit_scale, **given, **over
            )
        assert isinstance(loss, Tensor)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """Drop-in for `open_clip.SigLipLoss` that never holds the N x N logits.

    Equivalent to::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        z = 2 * torch.eye(len(logits)) - 1
        return -F.logsigmoid(z * logits).sum() / len(logits)

    Constructor and forward take what open_clip 3.3.0's take, and `chunk_size` of its development
    head. It, `cache_labels` and `dist_impl` are accepted and have nothing to do; several ranks are
    those of `ClipLoss`. The mean is over the rows of all ranks, as if one held them; open_clip's
    loss of a rank is the mean over its own. For shapes, dtypes and errors see
    `m3bind.ops.siglip_loss`.

    Raises:
        ValueError: an unknown dist_impl; in forward, a world_size that the default process group
            does not have.
    """

    DIST_IMPLS = ("bidir", "shift", "reduce", "gather")

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        chunk_size: int | None = None,
        backend: str | None = None,
        group: Any = None,
        scheme: str = "auto",
        sizes: str = "exchange",
        reduce_scale: bool = False,
    ) -> None:
        super().__init__()
        self.over_ranks = _OverRanks("SigLipLoss", world_size, group, scheme, sizes, reduce_scale)
        if dist_impl is not None and dist_impl not in self.DIST_IMPLS:
            raise ValueError(
                f"SigLipLoss: dist_impl={dist_impl!r}: choose one of {', '.join(self.DIST_IMPLS)}"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,  # [] or [1], already exponentiated
        logit_bias: Tensor | float | None,  # [] or [1]
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        given = (image_features, text_features, logit_scale, logit_bias)
        over = self.over_ranks.options()
        if over is None:
            loss = ops.siglip_loss(*given, backend=self.backend)
        else:
            loss = distributed.siglip_loss(*given, backend=self.backend, **over)
        return {"contrastive_loss": loss} if output_dict else loss


class DistillClipLoss(ClipLoss):
    """Drop-in for `open_clip.loss.DistillClipLoss`: CLIP's loss, and the teacher's distributions.

    Equivalent to::

        logits = logit_scale * image_features @ text_features.T
        teacher = dist_logit_scale * dist_image_features @ dist_text_features.T
        distill = -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean() / 2
        distill -= (teacher.T.softmax(1) * logits.T.log_softmax(1)).sum(1).mean() / 2
        return ClipLoss()(image_features, text_features, logit_scale), distill

    Unlike open_clip's, it detaches the teacher's features and scale: no gradient flows to them.
    They may have another width and dtype. Each of the two losses has `memory_budget` MiB. Ranks are
    those of `ClipLoss`. For shapes, dtypes and errors see `m3bind.ops.similarity_distill`.
    """

    def forward(  # type: ignore[override]  # as open_clip's, which has no bias here
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,  # [] or [1], already exponentiated
        dist_image_features: Tensor,  # [N, E]
        dist_text_features: Tensor,  # [N, E]
        dist_logit_scale: Tensor | float,  # [] or [1]
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """The contrastive and the distillation loss, or a dict of them by name."""
        contrastive = super().forward(image_features, text_features, logit_scale)
        given = (
            image_features, text_features, logit_scale, dist_image_features, dist_text_features,
            dist_logit_scale,
        )  # fmt: skip
        over = self.over_ranks.options()
        if over is None:
            distill = ops.similarity_distill(
                *given, kind="ce", memory_budget=self.memory_budget, backend=self.backend
            )
        else:
            distill = distributed.similarity_distill(
                *given, kind="ce", memory_budget=self.memory_budget, backend=self.backend, **over
            )
        assert isinstance(contrastive, Tensor) and isinstance(distill, Tensor)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill
