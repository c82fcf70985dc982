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
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
            modalities = {
                name: ModalityInfo(**spec) for name, spec in raw.pop("modalities").items()
            }
            found = cls(
                root=root, name=raw.pop("name"), simulated=bool(raw.pop("simulated")),
                labels=list(raw.pop("labels")), modalities=modalities, extra=raw,
            )  # fmt: skip
        except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
            raise M3BindError(f"{path} is not a data set's description: {error}") from None
        for name, info in modalities.items():
            if info.kind not in KINDS:
                raise M3BindError(f"{path}: {name}: kind {info.kind!r} is not {', '.join(KINDS)}")
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
