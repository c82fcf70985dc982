"""Progress bars: they move in a terminal, and are a line every ten seconds in a log."""

import sys
from typing import Any


def bar(iterable: Any = None, **options: Any) -> Any:
    """``tqdm.tqdm`` of the same arguments."""
    from tqdm import tqdm

    seconds = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(iterable, mininterval=seconds, dynamic_ncols=True, **options)
