"""Reports: properties that hold for any text."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3bind.data.reports import compose, sample_section, sections

WORDS = st.lists(st.sampled_from(["clear", "lungs,", "Findings", "impression", "3", "mm.", "é"]))
TEXT = WORDS.map(" ".join)
LAYOUT = st.sampled_from(["{}", "\n{}\n\n", "  {}", "{}\r\n"])


@given(TEXT, TEXT)
def test_what_is_composed_is_taken_apart(findings, impression) -> None:
    found = sections(compose(findings, impression))
    assert (found.findings, found.impression) == (findings, impression)
    assert found.whole == " ".join(text for text in (findings, impression) if text)


@given(TEXT, TEXT, LAYOUT, st.booleans())
def test_case_and_white_space_of_headings_do_not_matter(findings, impression, layout, swap) -> None:
    parts = [f"Findings : {findings}", f"  impression:\n{impression}"]
    report = "\n".join(layout.format(part) for part in (parts[::-1] if swap else parts))
    found = sections(report)
    assert (found.findings, found.impression) == (findings, impression)


@given(st.text())
def test_no_word_is_lost(report) -> None:
    found = sections(report)
    words = set(found.whole.split())
    assert words <= {piece for word in report.split() for piece in (word, word.partition(":")[2])}
    if "findings" not in report.casefold() and "impression" not in report.casefold():
        assert found.whole.split() == report.split() and found.impression == ""


@given(TEXT, TEXT, st.integers(0, 99))
def test_sample_is_never_empty(findings, impression, seed) -> None:
    report = compose(findings, impression)
    if not (findings or impression):
        with pytest.raises(ValueError, match="is empty"):
            sample_section(report, random.Random(seed))
        return
    found = sections(report)
    section = sample_section(report, random.Random(seed))
    assert section and section in (found.findings, found.impression, found.whole)


def test_whole_reports_are_half_of_what_is_drawn() -> None:
    rng = random.Random(0)
    drawn = [sample_section("FINDINGS: a.\nIMPRESSION: b.", rng) for _ in range(4000)]
    for text, share in {"a.": 0.25, "b.": 0.25, "a. b.": 0.5}.items():
        assert abs(drawn.count(text) / 4000 - share) < 0.04
    assert {sample_section("FINDINGS: a.", rng) for _ in range(50)} == {"a."}


@pytest.mark.parametrize("empty", ["", " \n", "FINDINGS:", "FINDINGS:\nIMPRESSION:\n"])
def test_empty_reports(empty) -> None:
    assert sections(empty).whole == ""
