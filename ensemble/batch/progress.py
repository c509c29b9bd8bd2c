"""Progress of a batch: on a terminal a bar with the time left and the number of failures, elsewhere one log line per case."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from ensemble.batch.case_loop import CaseOutcome
from ensemble.progress import SilentWatcher
from ensemble.text import TrustedLines

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)


class BatchProgress(SilentWatcher):
    """Counts cases and logs how each one ended. Used where stderr is not a terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.failed = total, 0, 0

    def tell(self, outcome: CaseOutcome) -> None:
        """Report the outcome of a case."""
        self.done += 1
        self.failed += outcome.status == "failed"
        text = {"done": "done", "kept": "complete already"}.get(outcome.status, outcome.message)
        log.log(
            logging.WARNING if outcome.status == "failed" else logging.INFO,
            "[%d/%d] %s: %s", self.done, self.total, outcome.case, TrustedLines(text),
        )  # fmt: skip

    def close(self) -> None:
        """Do nothing: there is no bar to remove."""


class BatchProgressBar(BatchProgress):
    """A progress bar on stderr; only failures are logged."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        super().__init__(total)
        # a stderr of its own: the readers turn the process's aside while image libraries may write to it
        self._stream = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="backslashreplace")
        self._bar: Progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("failed: {task.fields[failed]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
            console=Console(file=self._stream, force_terminal=True),
            redirect_stdout=sys.stdout.isatty(), redirect_stderr=False,
        )  # fmt: skip
        self._task = self._bar.add_task("cases", total=total, failed=0)
        self._bar.start()
        self._handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
        self._streams = [handler.setStream(sys.stdout) for handler in self._handlers]

    def tell(self, outcome: CaseOutcome) -> None:
        self.done += 1
        self.failed += outcome.status == "failed"
        if outcome.status == "failed":
            log.warning("%s: %s", outcome.case, TrustedLines(outcome.message))
        self._bar.update(self._task, completed=self.done, failed=self.failed)

    def close(self) -> None:
        self._bar.stop()
        for handler, stream in zip(self._handlers, self._streams, strict=True):
            if stream is not None:
                handler.setStream(stream)
        self._stream.close()


def open_progress(total: int) -> BatchProgress:
    """Return a progress bar if stderr is a terminal, else plain log lines."""
    return BatchProgressBar(total) if sys.stderr is not None and sys.stderr.isatty() else BatchProgress(total)
