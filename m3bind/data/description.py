"""The description of a data set to be prepared: labels, prompts, and kinds of own modalities.

YAML; every part may be left out:

    labels: [none, pneumonia]          # their order; else those of the manifest
    modalities:
      xray:
        labels: [none, pneumonia]      # those that this modality can show; else all it has
        prompts:
          name: {pneumonia: [pneumonia, chest radiograph of a patient with pneumonia]}
          findings: {pneumonia: [focal consolidation with air bronchograms]}
      dermoscopy: {kind: image2d}      # a modality of your own needs its kind
"""

from dataclasses import dataclass, field
from pathlib import Path

from m3bind.data.constants import KIND
from m3bind.data.dataset import Dataset, ModalityInfo, mapping, texts
from m3bind.errors import M3BindError

NONE = "none"  # the label of a sample without a finding


@dataclass(kw_only=True, slots=True)
class Description:
    """What the YAML says; empty without one."""

    labels: list[str] = field(default_factory=list)
    modalities: dict[str, ModalityInfo] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | None) -> "Description":
        """Read and check it; raises M3BindError, naming file and key."""
        if path is None:
            return cls()
        import yaml

        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise M3BindError(f"{path}: the description cannot be read: {reason}") from None
        mapping(raw, f"{path}", ("labels", "modalities"))
        found = cls(labels=texts(raw.get("labels", []), f"{path}: labels"))
        for name, spec in mapping(raw.get("modalities") or {}, f"{path}: modalities").items():
            where = f"{path}: modalities.{name}"
            info = found.modalities[name] = ModalityInfo.parse(spec or {}, where, KIND.get(name))
            if info.kind != KIND.get(name, info.kind):
                raise M3BindError(f"{where}.kind: {info.kind!r} must be {KIND[name]}")
            missing = sorted(set(info.labels) - set(found.labels))
            if found.labels and missing:
                raise M3BindError(f"{where}.labels: {missing[0]!r} is not among 'labels'")
            for group, by_label in info.prompts.items():
                for label in by_label:
                    if fault := found._unknown(name, label):
                        raise M3BindError(f"{where}.prompts.{group}: {fault}")
            for label in info.labels:
                if fault := found.check(name, label):
                    raise M3BindError(f"{path}: {fault}")
        return found

    def kinds(self) -> dict[str, str]:
        """Modality to kind: those that are built in, and those described."""
        return KIND | {name: info.kind for name, info in self.modalities.items()}

    def check(self, modality: str, label: str) -> str | None:
        """Why a label cannot stand on a sample of the modality, or None."""
        info = self.modalities.get(modality)
        if fault := self._unknown(modality, label):
            return fault
        for group, by_label in info.prompts.items() if info else ():
            # Names that are not given are made of the label itself.
            if group != "name" and label not in by_label:
                return (
                    f"{label!r} has no prompt in modalities.{modality}.prompts.{group} of the "
                    f"description (those have one: {', '.join(by_label)}): write one, or leave "
                    f"{group} out"
                )
        return None

    def _unknown(self, modality: str, label: str) -> str | None:
        own = self.modalities[modality].labels if modality in self.modalities else []
        allowed = own or self.labels
        if allowed and label not in allowed:
            return f"{label!r} is not among the description's labels ({', '.join(allowed)})"
        return None

    def dataset(self, root: Path, name: str, seen: dict[str, set[str]]) -> Dataset:
        """``dataset.yaml`` of the samples written; ``seen`` has the labels of each modality."""
        labels = self.labels or _ordered(set[str]().union(*seen.values()))
        modalities = {}
        for modality in sorted(seen, key=lambda m: (m not in KIND, [*KIND, m].index(m), m)):
            given = self.modalities.get(modality)
            own = given.labels if given and given.labels else []
            own = own or [label for label in labels if label in seen[modality]]
            prompts = dict(given.prompts) if given else {}
            names = prompts.get("name", {})
            prompts["name"] = {label: names.get(label, [_phrase(label)]) for label in own}
            modalities[modality] = ModalityInfo(
                kind=self.kinds()[modality], labels=own, prompts=prompts
            )
        return Dataset(root=root, name=name, simulated=False, labels=labels, modalities=modalities)


def _ordered(labels: set[str]) -> list[str]:
    return sorted(labels, key=lambda label: (label != NONE, label))


def _phrase(label: str) -> str:
    return "no abnormality" if label == NONE else label.replace("_", " ")
