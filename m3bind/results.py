"""`m3bind results`: renders what is recorded in a clone, by a script of its benchmarks."""

import subprocess
import sys

from m3bind.errors import M3BindError
from m3bind.resources import PACKAGE


def render() -> None:
    """Write docs/performance.md, README.md's block and m3bind/_verified.json anew.

    Raises M3BindError outside a clone: records and pages are not part of an installed package.
    """
    script = PACKAGE.parent / "benchmarks" / "render.py"
    if not script.is_file():
        raise M3BindError(
            f"m3bind results needs a clone of the repository, and {PACKAGE} is not part of one: "
            "git clone it, and call python -m m3bind results in its folder"
        )
    if subprocess.run([sys.executable, str(script)], cwd=script.parents[1]).returncode != 0:
        raise M3BindError("the results were not rendered: see above")
