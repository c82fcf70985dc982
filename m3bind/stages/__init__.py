"""The stages of a run: what each reads, trains, validates and writes, and where.

A run's folder holds::

    pretrain/<modality>/  align/<modality>/  distill/  control/    weights; logs and checkpoints
    text_cache/  features/    what frozen text layers and image trunks give, where it is kept
    embeddings/<stage>/<modality>-<split>.safetensors
    stages.json  metrics.json  report.html
"""

from m3bind.stages.run import Run
from m3bind.trained import SOURCES

__all__ = ["SOURCES", "Run"]
