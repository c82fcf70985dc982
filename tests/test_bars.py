"""Progress bars in a terminal and in a log."""

import io
import sys
import time

import pytest

from m3bind.bars import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch, stream: io.StringIO, **options) -> int:
    """How often a bar is drawn that takes half a second."""
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress_bar(range(20), desc="bar", **options):
        time.sleep(0.025)
    return stream.getvalue().count("bar:")


def test_a_log_gets_the_beginning_and_the_end(monkeypatch):
    assert drawn(monkeypatch, io.StringIO()) == 2
    assert drawn(monkeypatch, Terminal()) >= 4


@pytest.mark.parametrize("stream", (io.StringIO, Terminal))
def test_none_where_it_is_not_wanted(monkeypatch, stream):
    assert drawn(monkeypatch, stream(), disable=True) == 0
