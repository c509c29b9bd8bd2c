"""Progress of a case: a bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Any

log = logging.getLogger(__name__)


class LogWatcher:
    """Logs one line per stage."""

    def stage(self, name: str) -> None:
        log.info("%s ...", name)

    def windows(self, done: int, total: int) -> None:
        """Do nothing: one log line per window would be too many."""

    def close(self) -> None:
        """Do nothing: there is no bar to remove."""


class SilentWatcher:
    """Reports no progress."""

    def stage(self, name: str) -> None: ...

    def windows(self, done: int, total: int) -> None: ...


class ProgressBarWatcher:
    """Shows a progress bar per stage, on stderr."""

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
        """Remove the bar from the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def default_watcher() -> ProgressBarWatcher | LogWatcher:
    """Return a progress bar if stderr is a terminal, else log lines."""
    return ProgressBarWatcher() if sys.stderr is not None and sys.stderr.isatty() else LogWatcher()
