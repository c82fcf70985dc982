"""How large a step is."""

import math


def schedule(step: int, warmup: int, steps: int) -> float:
    """The share of the learning rate at ``step`` (from 1): linear warm-up, then half a cosine."""
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup + 1)))
