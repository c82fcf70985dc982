"""Whether a report names its patient: as people write names and numbers, and what is no name."""

import pytest

from m3bind.data.readers.identity import names_patient


@pytest.mark.parametrize(
    ("identifier", "report"),
    [
        ("DOE^JANE^MARIA", "Mrs Jane Doe has a clear chest."),
        ("DOE^JANE^^MRS", "Findings in Jane DOE."),
        ("DOE^JANE^MARIA", "Doe, Maria: no effusion."),
        ("Doe^J^Maria", "Maria Doe came back."),
        ("7741902", "MRN7741902: clear."), ("7741902", "MRN-7741902"), ("7741902", "(7741902)"),
        ("MRN-7741902", "Film of 7741902."), ("12-34-567", "number 1234567"), ("p001", "P-001"),
        ("Yamada^Tarou=山田^太郎", "Yamada Tarou, clear lungs"),
        ("Yamada^Tarou=山田^太郎", "患者山田太郎の胸部"), ("Yamada^Tarou=山田^太郎", "山田 太郎"),
        ("Smith-Jones", "Smith Jones has"), ("Smith-Jones^Anna", "Anna Smith Jones"),
        ("Smith-Jones^Anna", "Anna Jones"), ("Müller^Zoë", "Zoe Muller"),
        ("van der Berg^Jan", "Jan van der Berg"), ("Nguyen^An", "An Nguyen"),
        ("Jane Doe", "Ms. Doe (Jane)"), ("Doe, Jane Maria", "Jane Doe"),
        ("Quisling^Zebediah^^^1933", "Zebediah Quisling"),
    ],
)  # fmt: skip
def test_names(identifier, report) -> None:
    assert names_patient(report, ("", identifier))


@pytest.mark.parametrize(
    ("identifier", "report"),
    [
        ("White^Jane", "white matter is normal"),  # a surname that is a word
        ("White^J", "J point and white matter"), ("DOE^JANE", "Jane has a Dole bandage"),
        ("White^An", "an old lesion of white matter"), ("van der Berg^Jan", "van Jan"),
        ("7741902", "17741902"), ("7741902", "77419021"), ("12", "12 mm"), ("0012", "12 mm"),
        ("case-2019", "since 2019"), ("chest-ct", "chest CT"), ("p001", "up001"),
        ("ct head 003", "CT of the head"), ("", "anything"), ("^^^", "a b c"), ("=", "a b"),
    ],
)  # fmt: skip
def test_does_not_name(identifier, report) -> None:
    assert not names_patient(report, (identifier,))
