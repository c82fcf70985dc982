"""The dtypes in which operators compute, and trainings multiply."""

import torch

BF16 = (True, False, "auto")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, unfinished gradients and losses: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics_dtype(device: torch.device) -> torch.dtype:
    """The dtype of log-sum-exps between forward and backward: float64 wherever there is one.

    At logits of 120, float32 would round them by 4e-6: an error that all softmax values of a row
    share, and that the gradient of the scale multiplies by 120.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def multiplies_bf16(setting: bool | str, device: torch.device) -> bool:
    """Whether to train with products of bfloat16; ``auto``: where it is the faster way.

    So it is on GPUs from sm_80 on, and on CPUs with AVX-512 BF16 or AMX. Others widen every number
    anew, and take several times as long as in float32.
    """
    if setting != "auto":
        return bool(setting)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
