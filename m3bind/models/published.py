"""Trained experts and text encoders as folders: weights, and all that they were built from.

``model.safetensors`` holds what training changes; what the upstream files hold already is not
repeated, so ``m3bind_config.json`` beside it names those files and what was in them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from m3bind.config import ExpertConfig, ImageTowerConfig, LoraConfig, TextTowerConfig
from m3bind.errors import M3BindError
from m3bind.models.expert import Expert, build_expert, build_text_encoder
from m3bind.models.text import TextEncoder
from m3bind.models.weights import CONFIG, export_weights, import_config, import_weights

WEIGHTS = "model.safetensors"

# How a part is computed, trained or begun, not what the trained weights stand on; the size that a
# tower ends up with is part of its preprocessing.
_MAY_DIFFER = (
    "image.cache", "image.freeze", "image.size", "text.cache", "text.frozen_bf16", "lora.dropout",
    "seed",
)  # fmt: skip


def load_expert(folder: str | Path, config: ExpertConfig | None = None) -> Expert:
    """The expert of ``pretrain/<modality>`` or ``align/<modality>``; its embeddings are the same.

    Equivalent to ``build_expert`` with the settings that were saved, then loading the weights.
    ``config`` tells where its upstream files lie here, if no longer where they lay then. Raises
    M3BindError where it gives another expert than the one that was trained.
    """
    saved = _read(folder, "expert")[1]
    settings = dict(saved["expert"])
    if config is None:
        config = ExpertConfig(
            **settings
            | {
                "image": ImageTowerConfig(**settings["image"]),
                "text": TextTowerConfig(**settings["text"]),
                "lora": _lora(settings["lora"]),
            }
        )
    expert = build_expert(
        config, saved["modality"], width=saved["width"], seed=saved["seed"], kind=saved["kind"]
    )
    restore(expert, folder)
    return expert


def load_text_encoder(folder: str | Path, config: TextTowerConfig | None = None) -> TextEncoder:
    """The shared text encoder of ``distill`` or ``control``; ``config`` as in `load_expert`."""
    saved = _read(folder, "text")[1]
    encoder = build_text_encoder(
        config or TextTowerConfig(**saved["text"]),
        _lora(saved["lora"]),
        width=saved["width"],
        seed=saved["seed"],
        head_hidden=saved["head_hidden"],
    )
    restore(encoder, folder)
    return encoder


def publish(model: Expert | TextEncoder, folder: Path, start: Mapping[str, str]) -> None:
    """Write ``model`` into ``folder``; ``start``: the `contents` that its training began from."""
    config = {**model.built, "upstream": identity(_settings(model)), "start": dict(start)}
    if isinstance(model, Expert):
        config["preprocess"] = model.preprocess.to_dict()
        config["preprocess_fingerprint"] = model.preprocess.fingerprint()
    export_weights(folder / WEIGHTS, model.trainable_state(), config)


def restore(model: Expert | TextEncoder, folder: str | Path, prefix: str = "") -> None:
    """Give ``model`` the weights of ``folder``, if it was built like the one that was saved.

    Raises M3BindError for other settings (their names after ``prefix``), upstream files or
    preprocessing: the same weights would be of another model.
    """
    weights, saved = _read(folder, "expert" if isinstance(model, Expert) else "text")
    path = Path(folder) / WEIGHTS
    old, new = saved["upstream"], identity(_settings(model))
    for key in sorted({*old, *new} - set(_MAY_DIFFER)):
        if old.get(key) != new.get(key):
            raise M3BindError(
                f"{path} was trained with {prefix}{key} = {old.get(key)}, the settings give "
                f"{new.get(key)} now: set it back, or train again"
            )
    for key in ("width", "seed"):
        if saved[key] != model.built[key]:
            raise M3BindError(
                f"{path} was trained with {key} = {saved[key]}, the settings give "
                f"{model.built[key]} now: set it back, or choose another output"
            )
    if isinstance(model, Expert):
        preprocess = model.preprocess
        if saved["preprocess_fingerprint"] != preprocess.fingerprint():
            raise M3BindError(
                f"{path} was trained with another preprocessing ({saved['preprocess']}) than the "
                f"settings give now ({preprocess.to_dict()}): set {prefix}image back, or train "
                "again"
            )
    try:
        model.load_trainable_state(weights)
    except ValueError as error:
        raise M3BindError(f"{path}: {error}") from None


def identity(settings: ExpertConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their dotted names, with what is in upstream files instead of where they lie."""
    if isinstance(settings, ExpertConfig):
        settings = dataclasses.asdict(settings)
    found = dict(_flat(settings))
    for tower in settings.keys() & {"image", "text"}:
        source, files = _upstream(settings[tower]["source"], settings[tower]["weights"])
        found[f"{tower}.source"] = source
        found[f"{tower}.weights"] = None if files is None else _content(files)
    return found


def contents(folder: Path) -> str | None:
    """A short hash of the weights in ``folder`` and their description; None where none are."""
    return _content(folder, (WEIGHTS, CONFIG)) if (folder / WEIGHTS).is_file() else None


def as_configured(config: ExpertConfig) -> str:
    """What stands for the `contents` of an expert that was not trained."""
    own = {k: v for k, v in identity(config).items() if k == "seed" or k not in _MAY_DIFFER}
    text = json.dumps(own, sort_keys=True)
    return f"as configured, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def started_from(folder: Path) -> dict[str, str]:
    """The `contents` that the training of what lies in ``folder`` began from, by modality."""
    return import_config(folder / WEIGHTS).get("start", {})


def _settings(model: Expert | TextEncoder) -> dict[str, Any]:
    if isinstance(model, Expert):
        return model.built["expert"]
    return {key: value for key, value in model.built.items() if key not in ("width", "seed")}


def _read(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    path = Path(folder) / WEIGHTS
    weights, saved = import_weights(path)
    if kind not in saved or "upstream" not in saved:
        raise M3BindError(
            f"{path.with_name(CONFIG)} does not describe "
            f"{'an expert' if kind == 'expert' else 'a text encoder'} of this version: give the "
            "folder that training wrote, or train again"
        )
    return weights, saved


def _lora(settings: dict[str, Any] | None) -> LoraConfig | None:
    return None if settings is None else LoraConfig(**settings)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _upstream(source: str, weights: str | None) -> tuple[str, Path | None]:
    """A tower's source without its place, and the file or folder that its weights come from."""
    family, _, name = source.partition(":")
    if source == "minilm":
        from m3bind.models.minilm import minilm_folder

        return source, minilm_folder(weights)
    if family in ("hf", "open_clip") and Path(name).is_dir():
        return family, Path(name)
    return source, None if weights is None else Path(weights)


def _content(place: Path, names: tuple[str, ...] = ()) -> str:
    """A hash of a file, or of the files of a folder (texts about them apart) and their names."""
    if not place.exists():
        raise ValueError(
            f"no weights at {place}: give the path of a file or folder on this machine"
        )
    files = [place]
    if place.is_dir():
        files = sorted(f for f in place.iterdir() if f.is_file() and not f.name.startswith("."))
        files = [f for f in files if (f.name in names if names else f.suffix != ".md")]
    stats = [(file, file.stat()) for file in files]
    return _hash(tuple((file, s.st_size, s.st_mtime_ns) for file, s in stats), place.is_dir())


@lru_cache(maxsize=64)  # experts share files of gigabytes
def _hash(files: tuple[tuple[Path, int, int], ...], named: bool) -> str:
    whole = hashlib.sha256()
    for path, *_ in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name if named else ''} {digest}\n".encode())
    return f"sha256:{whole.hexdigest()[:16]}"
