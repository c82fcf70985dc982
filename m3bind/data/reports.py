"""Reports: FINDINGS and IMPRESSION, taken apart and put together."""

import random
import re
from dataclasses import dataclass

_HEADING = re.compile(r"^\s*(FINDINGS|IMPRESSION)\s*:", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Sections:
    """The sections of one report, without their headings; "" where there is none."""

    findings: str
    impression: str
    whole: str


def compose(findings: str, impression: str) -> str:
    """A report as it stands in the shards: ``FINDINGS: ...`` and ``IMPRESSION: ...`` lines."""
    parts = [("FINDINGS", findings.strip()), ("IMPRESSION", impression.strip())]
    return "\n".join(f"{heading}: {text}" for heading, text in parts if text)


def sections(report: str) -> Sections:
    """Take a report apart; one without headings is findings as a whole."""
    found = {"FINDINGS": "", "IMPRESSION": ""}
    pieces = _HEADING.split(report)
    before = pieces[0].strip()
    for heading, text in zip(pieces[1::2], pieces[2::2], strict=True):
        key = heading.upper()
        found[key] = " ".join([*found[key].split(), *text.split()])
    if before:
        found["FINDINGS"] = " ".join([*before.split(), *found["FINDINGS"].split()])
    findings, impression = found["FINDINGS"], found["IMPRESSION"]
    return Sections(findings, impression, " ".join(t for t in (findings, impression) if t))


def sample_section(report: str, rng: random.Random) -> str:
    """The whole report half of the time, else its findings or its impression, each as likely.

    One section alone says little of what an image shows: drawn as often as the whole, sections
    keep the start of a training on its plateau. Raises ValueError for an empty report: one must
    not come into the shards.
    """
    parts = sections(report)
    if not parts.whole:
        raise ValueError(f"the report {report!r} is empty: leave the sample out of the data set")
    return rng.choice([parts.whole, parts.whole, parts.findings, parts.impression]) or parts.whole
