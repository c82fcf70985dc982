"""A change to another package that lasts as long as somebody wants it."""

import threading
from collections.abc import Callable
from types import TracebackType


class Switch:
    """Calls `install` for the first of its users and `remove` after the last."""

    def __init__(self, install: Callable[[], None], remove: Callable[[], None]) -> None:
        self._install, self._remove = install, remove
        self._users = 0
        self._lock = threading.RLock()

    def on(self) -> None:
        with self._lock:
            if self._users == 0:
                self._install()
            self._users += 1

    def off(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._remove()


class Patch:
    """One user of a switch, on from the beginning: until `undo()`, or until a `with` block ends.

    Patches may be nested, undone in any order, and entered again, also within themselves.
    """

    def __init__(self, switch: Switch) -> None:
        self._switch = switch
        self._depth = 0
        self._on = False
        self._turn_on()

    def _turn_on(self) -> None:
        if not self._on:
            self._switch.on()
            self._on = True

    def undo(self) -> None:
        """Ends it; a second call does nothing."""
        if self._on:
            self._on = False
            self._switch.off()

    def __enter__(self) -> "Patch":
        self._turn_on()
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.undo()
