"""Whether a report names its patient: a header's or manifest's names and numbers, as people write.

A rejected report costs its owner a look; one that slips through gives a patient away. Still, what
any report may hold must not reject it: a surname alone may be a word, and so may an initial.
"""

import re
import unicodedata
from itertools import pairwise, product

_LONG_NUMBER = 5  # digits that tell a patient without the letters around them; 2019 may be a year
_SHORTEST = 4  # characters of an identifier that is looked for at all
_COMPONENTS = 3  # of a name in DICOM: family, given, middle; then come prefix and suffix


def names_patient(report: str, identifiers: tuple[str, ...]) -> bool:
    """Whether the report holds one of the identifiers.

    One with a digit is a number: found where no other digit touches it, whatever stands in front
    (``MRN7741902`` for ``7741902``). Any other is a name, as in DICOM (``DOE^JANE^MARIA=...``) or
    as written (``Jane Doe``; ``Doe, Jane``): found where family and one given name are, in any
    order, with or without hyphens and accents.
    """
    text = _plain(report)
    return any(_names(text, identifier.strip()) for identifier in identifiers)


def _names(text: str, identifier: str) -> bool:
    plain = _plain(identifier)
    if re.search(r"\d", plain):
        if _has_number(text, plain):
            return True
        if "^" not in plain:
            return False
    if identifier.islower() and not re.search(r"[\s,^]", identifier):
        return False  # "chest-ct" is what somebody calls a patient, not a name
    return any(_has_name(text, group) for group in plain.split("="))


def _plain(text: str) -> str:
    """Without accents and capitals."""
    parts = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in parts if not unicodedata.combining(c))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)


def _has_number(text: str, identifier: str) -> bool:
    pieces = re.findall(r"\d+|[^\W\d_]+", identifier)
    numeric = [i for i, piece in enumerate(pieces) if piece.isdigit()]
    core = pieces[numeric[0] : numeric[-1] + 1]  # without "MRN" in front
    edge = r"\d"
    if sum(len(piece) for piece in core if piece.isdigit()) < _LONG_NUMBER:
        core, edge = pieces, r"[^\W_]"
    if len("".join(core)) < _SHORTEST:
        return False
    pattern = r"[\W_]{0,2}".join(core)
    return re.search(rf"(?<!{edge}){pattern}(?!{edge})", text) is not None


def _has_name(text: str, group: str) -> bool:
    if "^" in group:
        family, *rest = group.split("^")[:_COMPONENTS]
        given = " ".join(rest)
    elif "," in group:
        family, _, given = group.partition(",")
    else:
        *others, family = _words(group) or [""]
        given = " ".join(others)
    families, givens = _words(family), _words(given)
    whole = "".join(families + givens)
    if whole.upper() == whole.lower():  # a script without capitals, where words may run together
        joined = "".join(_words(text))
        return len(whole) > 1 and any(
            "".join(order) in joined for order in (families + givens, givens + families)
        )
    words = _words(text)
    if not givens:  # "Smith-Jones": two words that stand side by side are no accident
        return len(families) > 1 and " ".join(families) in " ".join(words)
    # "van der Berg": the particles stand in other names and languages too
    families = [word for word in families if len(word) > 3] or families
    beside = {frozenset(pair) for pair in pairwise(words)}
    for one, other in product(families, givens):
        shorter = min(len(one), len(other))
        # "An" is an article too, so that it has to stand beside "Nguyen"
        if shorter > 2 and one in words and other in words:
            return True
        if shorter == 2 and {one, other} in beside:
            return True
    return False
