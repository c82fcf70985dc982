"""Reads upstream weights without running their code, and says what did not fit."""

import fnmatch
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Older transformers saved these buffers; newer models have no such key.
ALWAYS_DROPPED = ("*embeddings.position_ids",)


@dataclass(kw_only=True, slots=True)
class LoadReport:
    """What `load_weights` did with each key that did not simply fit."""

    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file or, with ``weights_only=True``, a torch checkpoint.

    A checkpoint's ``state_dict`` or ``model`` entry is taken where there is one. Raises
    ValueError for a file that is missing, or that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weights at {path}: give the path of a .safetensors or .pt file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is not a file of weights alone ({reason}): convert it to safetensors"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__}: expected a state dict")
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    drop: Iterable[str] = (),
    may_miss: Iterable[str] = (),
) -> LoadReport:
    """Load ``state`` into ``module`` and fail on every key that nobody declared.

    ``drop`` and ``may_miss`` are patterns such as ``"pooler.*"``. Raises ValueError with the
    keys that are missing, unexpected, or of another shape.
    """
    report = LoadReport()
    patterns = (*ALWAYS_DROPPED, *drop)
    wanted = module.state_dict()
    taken = {}
    for name, value in state.items():
        if name not in wanted and any(fnmatch.fnmatch(name, p) for p in patterns):
            report.dropped.append(name)
        elif name not in wanted:
            report.unexpected.append(name)
        elif wanted[name].shape != value.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(value.shape)}, this model needs "
                f"{tuple(wanted[name].shape)}: are these the weights of another model?"
            )
        else:
            taken[name] = value
    undeclared = []
    for name in wanted.keys() - taken.keys():
        report.missing.append(name)
        if not any(fnmatch.fnmatch(name, p) for p in may_miss):
            undeclared.append(name)
    if undeclared or report.unexpected:
        raise ValueError(
            f"{source} does not fit: missing {_some(sorted(undeclared))}; "
            f"unexpected {_some(sorted(report.unexpected))}"
        )
    module.load_state_dict(taken, strict=False)
    if report.dropped:
        log.info("%s: dropped %s", source, _some(report.dropped))
    if report.missing:
        log.warning("%s: not in the file, so left as initialised: %s", source, report.missing)
    return report


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
