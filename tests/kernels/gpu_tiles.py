"""A plugin of pytest: the interpreter's kernels run with an H100's tiles, of 16-bit features.

So the tests of kernels are run as on a GPU before they are run on one: sizes that fill a tile of
64 x 64 may not fill one of 128 x 256.
"""

import torch

from m3bind_kernels import configs, kept, tuning

HOPPER, SHARED_BYTES = 90, 227 << 10
interpreters = configs.for_device


def for_device(kernel: str, half: bool, device: torch.device) -> list[configs.Config]:
    # NumPy's float32 products have other bits for tiles of other shapes; a GPU's do not.
    if not half:
        return interpreters(kernel, half, device)
    return configs.candidates(kernel, half, HOPPER, SHARED_BYTES)[:1]


configs.for_device = tuning.for_device = kept.for_device = for_device
