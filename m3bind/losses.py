"""Losses as modules, with open_clip's signatures."""

from torch import Tensor, nn

from m3bind import ops


class ClipLoss(nn.Module):
    """Drop-in for `open_clip.ClipLoss` that never holds the N x N logits.

    Equivalent to::

        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Constructor and forward take what open_clip 3.3.0's take. `cache_labels` is accepted and has
    nothing to do: there are no labels. Logits are formed in float32 also from 16-bit features,
    and under autocast. For shapes, dtypes and errors see `m3bind.ops.clip_loss`.

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
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if world_size != 1:
            raise ValueError(
                f"{type(self).__name__}: world_size={world_size}: losses over several ranks are "
                "not in this version yet; use world_size=1, or open_clip's loss of that name"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
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
            backend=self.backend,
        )
        assert isinstance(loss, Tensor)
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
