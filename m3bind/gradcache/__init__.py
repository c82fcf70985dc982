"""Encoders whose activations do not fit: chunk by chunk, with the gradient of the whole batch."""

from m3bind.gradcache.cache import GradCache

__all__ = ["GradCache"]
