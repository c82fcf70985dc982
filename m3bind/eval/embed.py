"""Embeddings of a split, by whatever encoders a stage has."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3bind.data.reports import sections
from m3bind.eval.store import EmbeddingSet

TEXT_BATCH = 64


@torch.no_grad()
def embed_texts(encode_text: Callable[[list[str]], Tensor], texts: list[str]) -> np.ndarray:
    """Unit-norm embeddings [N, D]; equal texts are embedded once, short ones with short ones."""
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    parts = [
        encode_text(unique[i : i + TEXT_BATCH]).float().cpu()
        for i in range(0, len(unique), TEXT_BATCH)
    ]
    place = {text: i for i, text in enumerate(unique)}
    return torch.cat(parts)[[place[text] for text in texts]].numpy()


@torch.no_grad()
def embed_split(
    modality: str,
    split: str,
    batches: Iterable[tuple[Any, list[str], list[dict[str, Any]]]],  # images, reports, meta
    encode_image: Callable[[Any], Tensor],
    encode_text: Callable[[list[str]], Tensor],
    prompts: dict[str, dict[str, list[str]]],
    *,
    texts: bool = True,
) -> EmbeddingSet:
    """One pass over a split: images and, with ``texts``, whole reports and prompts.

    ``encode_image`` takes the images of a batch (or features of them), ``encode_text`` raw
    strings; both give unit-norm [B, D]. A sample with several labels counts under the first.
    """
    images: list[Tensor] = []
    reports: list[str] = []
    meta: list[dict[str, Any]] = []
    for inputs, batch_reports, batch_meta in batches:
        images.append(encode_image(inputs).float().cpu())
        reports += [sections(report).whole for report in batch_reports]
        meta += batch_meta
    image = torch.cat(images).numpy()
    kinds: dict[str, dict[str, np.ndarray]] = {}
    text = image[:0]
    if texts:
        text = embed_texts(encode_text, reports)
        for kind, classes in prompts.items():
            kinds[kind] = {label: embed_texts(encode_text, t) for label, t in classes.items()}
    return EmbeddingSet(
        modality=modality,
        split=split,
        image=image,
        text=text,
        labels=[sample["labels"][0] if sample["labels"] else "" for sample in meta],
        ids=[sample["id"] for sample in meta],
        prompts=kinds,
        simulated=any(sample["simulated"] for sample in meta),
    )
