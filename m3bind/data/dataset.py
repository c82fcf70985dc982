"""``dataset.yaml``: what the shards beside it hold, and how their labels are put in words."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from m3bind.data.constants import KINDS
from m3bind.errors import M3BindError
from m3bind.files import atomic_write


@dataclass(kw_only=True, slots=True)
class ModalityInfo:
    """What one modality of a data set is and can show."""

    kind: str
    labels: list[str] = field(default_factory=list)
    prompts: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @classmethod
    def parse(cls, raw: Any, where: str, kind: str | None = None) -> "ModalityInfo":
        """Out of YAML; ``kind`` stands where it names none. Raises M3BindError at ``where``."""
        spec = mapping(raw, where, ("kind", "labels", "prompts"))
        kind = spec.get("kind", kind)
        if kind not in KINDS:
            raise M3BindError(f"{where}.kind: {kind!r} must be one of {', '.join(KINDS)}")
        prompts = {
            group: {
                label: texts(given, f"{where}.prompts.{group}.{label}", least=1)
                for label, given in mapping(by_label, f"{where}.prompts.{group}").items()
            }
            for group, by_label in mapping(spec.get("prompts", {}), f"{where}.prompts").items()
        }
        labels = texts(spec.get("labels", []), f"{where}.labels")
        return cls(kind=kind, labels=labels, prompts=prompts)


@dataclass(kw_only=True, slots=True)
class Dataset:
    """``dataset.yaml``: labels, modalities and prompts of the shards beside it."""

    root: Path
    name: str
    simulated: bool
    labels: list[str]
    modalities: dict[str, ModalityInfo]
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, root: str | Path) -> "Dataset":
        """Read and check ``<root>/dataset.yaml``; raises M3BindError, naming file and key."""
        import yaml

        root = Path(root)
        path = root / "dataset.yaml"
        if not path.is_file():
            raise M3BindError(
                f"no data set in {root} (no dataset.yaml): make one with m3bind phantom or prepare"
            )
        try:
            raw = mapping(yaml.safe_load(path.read_text(encoding="utf-8")), f"{path}")
            modalities = {
                name: ModalityInfo.parse(spec, f"{path}: modalities.{name}")
                for name, spec in mapping(raw.pop("modalities"), f"{path}: modalities").items()
            }
            found = cls(
                root=root, name=str(raw.pop("name")), simulated=bool(raw.pop("simulated")),
                labels=texts(raw.pop("labels"), f"{path}: labels"),
                modalities=modalities, extra=raw,
            )  # fmt: skip
        except KeyError as error:
            raise M3BindError(f"{path}: the key {error} is missing") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise M3BindError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        for name, info in modalities.items():
            unknown = sorted(set(info.labels) - set(found.labels))
            if unknown:
                raise M3BindError(f"{path}: {name}: label {unknown[0]!r} is not among 'labels'")
            for group, by_label in info.prompts.items():
                missing = [label for label in info.labels if label not in by_label]
                if missing:
                    raise M3BindError(
                        f"{path}: modalities.{name}.prompts.{group} has no prompt for the label "
                        f"{missing[0]!r}: write one, or leave {group} out"
                    )
        return found

    def write(self) -> None:
        """Write ``dataset.yaml``, atomically; do it last, as it makes the data set one."""
        import yaml

        content = {
            "name": self.name, "simulated": self.simulated, "labels": self.labels,
            "modalities": {name: asdict(info) for name, info in self.modalities.items()},
            **self.extra,
        }  # fmt: skip
        with atomic_write(self.root / "dataset.yaml") as partial:
            partial.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def mapping(raw: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    """``raw`` if it maps texts, and none but ``keys``; raises M3BindError at ``where``."""
    if not isinstance(raw, dict):
        raise M3BindError(f"{where}: must be a mapping, not {raw!r}")
    for key in raw:
        if not isinstance(key, str):
            raise M3BindError(f"{where}: the key {key!r} is no text: put it in quotes")
        if keys is not None and key not in keys:
            raise M3BindError(f"{where}: unknown key {key!r}; known: {', '.join(keys)}")
    return raw


def texts(raw: Any, where: str, least: int = 0) -> list[str]:
    """``raw`` if it is a list of texts, ``least`` or more; raises M3BindError at ``where``."""
    whole = isinstance(raw, list) and all(isinstance(item, str) and item.strip() for item in raw)
    if not whole or len(raw) < least:
        raise M3BindError(f"{where}: must be a list of texts, not {raw!r}")
    return list(raw)
