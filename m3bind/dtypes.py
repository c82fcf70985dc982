"""The dtypes in which operators compute."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, unfinished gradients and losses: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics_dtype(device: torch.device) -> torch.dtype:
    """The dtype of log-sum-exps between forward and backward: float64 wherever there is one.

    At logits of 120, float32 would round them by 4e-6: an error that all softmax values of a row
    share, and that the gradient of the scale multiplies by 120.
    """
    return torch.float32 if device.type == "mps" else torch.float64
