"""Image and text towers, their heads, and the experts that they make."""

from m3bind.models.expert import Expert, build_expert, build_text_encoder
from m3bind.models.published import load_expert, load_text_encoder
from m3bind.models.text import TextEncoder

__all__ = [
    "Expert",
    "TextEncoder",
    "build_expert",
    "build_text_encoder",
    "load_expert",
    "load_text_encoder",
]
