"""Reports of simulated patients: sentences of reports.yaml, filled with what was simulated."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from m3bind.data.phantom.canvas import Simulated
from m3bind.data.phantom.patients import Patient
from m3bind.data.phantom.table import package_yaml, table

_EXTENT = {"mild": "slight", "moderate": "moderate", "severe": "marked"}
_CONDUCTION = {
    "first": "PR prolonged to {pr_ms} ms with every P wave conducted",
    "second": "dropped beats after non conducted P waves",
    "third": "P waves and QRS complexes dissociated, slow escape rhythm",
}
_TISSUE = {
    "lung": "alveoli with thin septa and empty airspaces",
    "kidney": "unremarkable glomeruli, tubules and thin walled arteriole",
}


@cache
def _sentences() -> dict[str, Any]:
    return package_yaml("reports.yaml")


def _words(p: Patient, facts: dict[str, Any]) -> dict[str, Any]:
    """What may stand in braces, each also with a capital: {side} and {Side}."""
    words = p.attributes() | {"extent": _EXTENT[p.severity]} | facts
    words["name"] = table().names[p.label][0]
    if "degree" in facts:
        words["conduction"] = _CONDUCTION[facts["degree"]].format(**words)
    if "organ" in facts:
        words["tissue"] = _TISSUE[facts["organ"]]
    capitals = {k.capitalize(): v.capitalize() for k, v in words.items() if isinstance(v, str)}
    return words | capitals


def write_report(p: Patient, simulated: Simulated) -> tuple[str, str]:
    """Findings, and an impression that names the condition in half of the cases."""
    rng = p.rng("report")
    parts = _sentences()[p.modality]
    words = _words(p, simulated.facts)

    def pick(sentences: list[str]) -> str:
        text = sentences[int(rng.integers(len(sentences)))].format(**words)
        return text[:1].upper() + text[1:]

    sentences = [pick(parts["context"]), pick(parts["findings"][p.label])]
    for fact, phrases in parts["incidental"].items():
        if simulated.facts.get(fact) or fact in simulated.facts.values():
            sentences.append(pick(phrases))
    sentences.append(pick(parts["plain"]))
    if rng.uniform() < 0.5:
        named = parts["impression"]["named"]
        impression = pick(_sentences()["none_named"] if p.label == "none" else named)
    else:
        impression = pick(parts["impression"]["described"][p.label])
    return " ".join(x for x in sentences if x), impression


def plain_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts as JSON takes them: NumPy scalars as Python's."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in facts.items()}
