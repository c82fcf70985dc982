"""hypothesis, or, where it is not installed, stand-ins that skip its tests and let the others run.

`make gpu` runs where only torch, triton and pytest are: the kernels' tests share data with files
that also have tests of properties.
"""

from typing import Any

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Anything:
        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: self

    st = _Anything()

    def settings(**_: Any) -> Any:
        return lambda function: function

    def given(**_: Any) -> Any:
        return pytest.mark.skip("needs hypothesis")


__all__ = ["given", "settings", "st"]
