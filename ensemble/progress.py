"""Telling people how far a case has come: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger(__name__)


class LogLines:
    """One log line a stage."""

    def stage(self, name: str) -> None:
        log.info("%s ...", name)

    def windows(self, done: int, total: int) -> None:
        """Nothing: a log is no place for a line a window."""

    def close(self) -> None:
        """Nothing to take away."""


class SilentWatcher:
    """Nobody is watching."""

    def stage(self, name: str) -> None: ...

    def windows(self, done: int, total: int) -> None: ...


class WindowBar:
    """A progress bar a stage, on stderr."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._name = ""

    def stage(self, name: str) -> None:
        self.close()
        self._name = name

    def windows(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, desc=self._name, unit="window", leave=False)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def default_watcher() -> WindowBar | LogLines:
    """Return a bar when a person is watching stderr, lines otherwise."""
    return WindowBar() if sys.stderr is not None and sys.stderr.isatty() else LogLines()
