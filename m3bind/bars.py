"""Progress bars: they move on a screen, and are a line every ten seconds in a log."""

import sys
from typing import Any


def progress_bar(iterable: Any = None, disable: bool = False, **options: Any) -> Any:
    """``tqdm.auto.tqdm`` of the same arguments; not ``disable`` leaves it to TQDM_DISABLE."""
    from tqdm.auto import tqdm

    if disable:
        options["disable"] = True
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        options["mininterval"] = 10.0
    return tqdm(iterable, dynamic_ncols=True, **options)
