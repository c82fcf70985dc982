"""The functions of the package `inf_cl` (Inf-CL), computed by m3bind's operators.

    from m3bind.integrations.inf_cl import cal_flash_loss, cal_inf_loss, cal_ring_loss

Names, arguments and values are Inf-CL's. What differs:

- Any device and any number of features. Inf-CL runs on CUDA; there D is a multiple of `head_dim`,
  itself a power of 2 from 16 up: with other values its kernels address the wrong rows silently.
- 16-bit features stay 16-bit and their logits are float32. Inf-CL rounds `scale * q` to 16 bit,
  and float32 features to TF32.
- Logits far below 0 keep their value. In Inf-CL, columns that only fill up a block enter the
  maximum with 0: 65 logits of -120 give a log-sum-exp of -inf instead of -115.8.
- The gradients are right. Where the number of rows is not a multiple of 64, Inf-CL's backward reads
  beyond the end of the incoming gradient; the scale of its cal_ring_loss and cal_inf_loss has no
  gradient without a process group (backward raises), and one W times too large over W ranks.
- Over W ranks the mean is that of all rows, on every rank, and its gradients are those that DDP and
  FSDP average (`m3bind.distributed`). Inf-CL's is the mean of a rank's own rows.

Each is one direction: for both, one call of `m3bind.clip_loss` forms the logits once, not twice.

Source: Cheng et al. 2024, arXiv:2410.17243.
"""

import torch
from torch import Tensor

from m3bind import distributed, ops

_NO_COLUMN = 1 << 40


def cal_flash_loss(
    q: Tensor,  # [N, D]
    k: Tensor,  # [M, D]
    labels: Tensor | None = None,  # [N] int64
    scale: Tensor | float | None = None,  # [] or [1]
    head_dim: int = 256,
) -> Tensor:  # [N]
    """The loss of each row of q, which looks for its row of k.

    Equivalent to::

        F.cross_entropy(scale * q @ k.T, labels, reduction="none")

    Args:
        q, k: features; of different dtypes: both are cast to the wider one, as autocast leaves
            features. Autocast does not round them.
        labels: the row of k for each row of q (below 0: ignored, where Inf-CL would count from the
            end); default: row i and row i.
        scale: the factor itself, not its logarithm; default: 1.
        head_dim: accepted, and without effect.

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit.
    """
    return _rows(q, k, labels, scale, "none")


def cal_ring_loss(
    q: Tensor,  # [N, D]
    k: Tensor,  # [M, D]
    labels: Tensor | None = None,  # [N] int64
    scale: Tensor | float | None = None,  # [] or [1]
    head_dim: int = 256,
) -> Tensor:  # []
    """The mean of `cal_flash_loss`, over the rows of q and k of all ranks.

    Labels count this rank's rows of k, as Inf-CL's do.

    Equivalent to::

        F.cross_entropy(scale * q @ k.T, labels)

    Raises:
        ValueError: as `cal_flash_loss`.
    """
    return _mean(q, k, labels, scale)


def cal_inf_loss(
    q: Tensor,  # [N, D]
    k: Tensor,  # [M, D]
    labels: Tensor | None = None,  # [N] int64
    scale: Tensor | float | None = None,  # [] or [1]
    head_dim: int = 256,
) -> Tensor:  # []
    """The mean of `cal_flash_loss`, over the rows of q and k of all ranks.

    Labels count this rank's rows of k, as Inf-CL's do.

    Equivalent to::

        F.cross_entropy(scale * q @ k.T, labels)

    Raises:
        ValueError: as `cal_flash_loss`.
    """
    return _mean(q, k, labels, scale)


def _mean(q: Tensor, k: Tensor, labels: Tensor | None, scale: Tensor | float | None) -> Tensor:
    if labels is not None and distributed.world_size() > 1:
        first = distributed.first_column(k.shape[0])
        # Of a rank's own rows alone, also where a number too large would be another rank's.
        too_large = labels >= k.shape[0]
        labels = (labels + first).where(labels >= 0, -1).masked_fill(too_large, _NO_COLUMN)
    return _rows(q, k, labels, scale, "mean")


def _rows(
    q: Tensor, k: Tensor, labels: Tensor | None, scale: Tensor | float | None, reduction: str
) -> Tensor:
    dtype = torch.promote_types(q.dtype, k.dtype)
    # Inf-CL's function of rows stays on its rank.
    clip_loss = ops.clip_loss if reduction == "none" else distributed.clip_loss
    with torch.autocast(q.device.type, enabled=False):
        loss = clip_loss(
            q.to(dtype),
            k.to(dtype),
            1.0 if scale is None else scale,
            labels=labels,
            directions="rows",
            reduction=reduction,
        )
    assert isinstance(loss, Tensor)
    return loss
