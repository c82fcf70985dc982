"""Hidden states of frozen layers, kept by text, so that each text passes them once."""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from m3bind.files import write_tensors
from m3bind.models.bert import Packed

log = logging.getLogger(__name__)
BATCH = 64


class HiddenCache:
    """Maps a text to the hidden states [length, width] that ``compute`` gives for it.

    Equivalent, without the memory, to ``compute(texts, device).hidden.to(dtype).float()``: the
    states are rounded to ``dtype`` (float16 halves the memory; its relative error is 2**-11) and
    every distinct text is kept once, at its own length, on the CPU. ``fingerprint`` names the
    weights and the tokenizer, so that a saved cache is never used with others.
    """

    def __init__(
        self,
        compute: Callable[[list[str], torch.device], Packed],
        length: Callable[[str], int],
        *,
        dtype: torch.dtype = torch.float16,
        fingerprint: str = "",
    ) -> None:
        self.compute, self.length = compute, length
        self.dtype, self.fingerprint = dtype, fingerprint
        self._states: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, text: str) -> bool:
        return text in self._states

    @property
    def nbytes(self) -> int:
        """Memory held by the states, in bytes."""
        return sum(state.numel() * state.element_size() for state in self._states.values())

    def precompute(
        self,
        texts: Iterable[str],
        device: torch.device,
        progress: Callable[[Iterable[list[str]]], Iterable[list[str]]] | None = None,
    ) -> None:
        """Compute on ``device`` what is missing; ``progress`` wraps the batches, as tqdm does."""
        # In one order for one set of texts: the last bit depends on a text's batch.
        missing = sorted(sorted({t for t in texts if t not in self._states}), key=self.length)
        if not missing:
            return
        batches = [missing[i : i + BATCH] for i in range(0, len(missing), BATCH)]
        for batch in progress(batches) if progress else batches:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                packed = self.compute(batch, device)
                states = packed.hidden.to(self.dtype).cpu()
            parts = states.split(packed.lengths.tolist())
            # A copy each: a slice would keep its whole batch alive.
            self._states.update((t, s.clone()) for t, s in zip(batch, parts, strict=True))

    def __call__(self, texts: list[str], device: torch.device) -> Packed:
        # Alone, since the last bit depends on the texts that share a batch: a resumed run asks
        # for the same texts in other company.
        for text in dict.fromkeys(texts):
            self.precompute([text], device)
        states = [self._states[text] for text in texts]
        lengths = torch.tensor([len(state) for state in states], device=device)
        with torch.autocast("cpu", enabled=False):  # which does not know float16 here
            hidden = torch.cat(states)
        return Packed(hidden.to(device).float(), lengths)

    def save(self, path: Path, texts: Iterable[str]) -> None:
        """Write the states of ``texts`` to a safetensors file, atomically."""
        texts = sorted(set(texts))
        if not texts:
            return
        states = [self._states[text] for text in texts]
        tensors = {
            "states": torch.cat(states),
            "lengths": torch.tensor([len(state) for state in states]),
            "texts": torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8),
        }
        write_tensors(path, tensors, {"fingerprint": self.fingerprint})

    def load(self, path: Path) -> bool:
        """Take the states of a saved cache; False if there is none, or one of other weights."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("fingerprint") != self.fingerprint:
                    log.warning("%s holds the states of other weights: not used", path)
                    return False
                states = file.get_tensor("states")
                lengths = file.get_tensor("lengths").tolist()
                texts = json.loads(file.get_tensor("texts").numpy().tobytes())
        except SafetensorError as error:
            log.warning("%s cannot be read (%s): not used", path, error)
            return False
        if states.dtype != self.dtype:
            log.warning("%s holds %s, not %s: not used", path, states.dtype, self.dtype)
            return False
        self._states.update(zip(texts, states.split(lengths), strict=True))
        return True
