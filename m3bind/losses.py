"""Losses as modules, with open_clip's signatures."""

from torch import Tensor, nn

from m3bind import distributed, ops


class ClipLoss(nn.Module):
    """Drop-in for `open_clip.ClipLoss` that never holds the N x N logits.

    Equivalent to::

        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Constructor and forward take what open_clip 3.3.0's take. `cache_labels` is accepted and has
    nothing to do: there are no labels. Logits are formed in float32 also from 16-bit features,
    and under autocast. For shapes, dtypes, errors and `memory_budget` (MiB that save a matrix
    product) see `m3bind.ops.clip_loss`.

    Raises:
        ValueError: world_size > 1, which this version cannot do yet.
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
        memory_budget: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        distributed.require_one_rank(type(self).__name__, world_size, "open_clip's loss")
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
        loss = ops.clip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias=logit_bias,
            memory_budget=self.memory_budget,
            backend=self.backend,
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
    head. It and `cache_labels` are accepted and have nothing to do, as has `dist_impl`, which says
    how several ranks exchange features. For shapes, dtypes and errors see `m3bind.ops.siglip_loss`.

    Raises:
        ValueError: world_size > 1, which this version cannot do yet; an unknown dist_impl.
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
    ) -> None:
        super().__init__()
        distributed.require_one_rank("SigLipLoss", world_size, "open_clip's loss")
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
        loss = ops.siglip_loss(
            image_features, text_features, logit_scale, logit_bias, backend=self.backend
        )
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
    They may have another width and dtype. For shapes, dtypes and errors see
    `m3bind.ops.similarity_distill`.

    Raises:
        ValueError: world_size > 1, which this version cannot do yet.
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
        distill = ops.similarity_distill(
            image_features,
            text_features,
            logit_scale,
            dist_image_features,
            dist_text_features,
            dist_logit_scale,
            kind="ce",
            backend=self.backend,
        )
        assert isinstance(contrastive, Tensor) and isinstance(distill, Tensor)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill
