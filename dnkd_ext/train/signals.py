"""SIGINT and SIGTERM as a wish to stop, and how a command that did so says it."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

__all__ = ["Interrupted", "Signals"]


class Interrupted(Exception):
    """A command was asked to stop by ``signal`` and has kept what it did.

    ``together``: all processes stop at this very place.
    """

    def __init__(self, message: str, number: int, *, together: bool = True) -> None:
        super().__init__(message)
        self.signal = number
        self.together = together


class Signals:
    """SIGINT and SIGTERM as a wish to stop, while the context lasts; a second SIGINT interrupts."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def stop(self, when: str) -> None:
        """Raise Interrupted if one has come; ``when`` says what was being done."""
        if self.received:
            name = signal.Signals(self.received).name
            raise Interrupted(f"stopped by {name} {when}", self.received)

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: nothing is caught
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
