"""Send messages to stdout, since any line on stderr marks a grand-challenge job with a warning.

The final line about a failure also goes to stderr, because the platform shows its user the last line of that. File names that can't be
encoded are written with escapes.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any, BinaryIO

from ensemble.errors import UserError
from ensemble.memory import as_user_error
from ensemble.text import TrustedLines, escape_invisible

log = logging.getLogger(__name__)


def set_up_logging(level: int = logging.INFO) -> None:
    """Log our messages from `level` on, those of libraries from warnings on.

    Names that stdout can't spell, or a reader who has gone, are no reason to fail.
    """
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Visible("%(message)s"))
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    logging.getLogger("ensemble").setLevel(level)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def redirect_messages_to_stderr() -> Iterator[None]:
    """Send messages to stderr inside the block, so that stdout holds only the data that a command prints."""
    handlers = [
        h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler) and h.stream is sys.stdout
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(sys.stdout)


class _Visible(logging.Formatter):
    """Escapes control characters in log records, so that no inserted text can start a line or move the cursor.

    Line breaks count where they stand in a message of ours, in the text of a UserError or in TrustedLines.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's text; tracebacks are indented."""
        shown = copy(record)
        if record.name.partition(".")[0] != "ensemble":
            shown.msg, shown.args = escape_invisible(record.getMessage()), ()
        elif isinstance(record.args, Mapping):
            shown.args = {name: _as_argument(value) for name, value in record.args.items()}
        elif record.args is not None:
            shown.args = tuple(_as_argument(value) for value in record.args)
        return super().format(shown)

    def formatException(self, ei: Any) -> str:  # noqa: N802 (logging's name)
        """Return a traceback with control characters escaped."""
        return "\n".join("  " + escape_invisible(line) for line in super().formatException(ei).split("\n"))


def _as_argument(value: object) -> object:
    """Return a log argument with control characters escaped; numbers unchanged."""
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    ours = isinstance(value, UserError | TrustedLines)
    return escape_invisible(text, keep="\n") if ours else escape_invisible(text)


def log_failure(error: Exception) -> None:
    """Log why a case or a call failed; for a bug with the traceback. Call it while handling the error."""
    error = as_user_error(error)
    if isinstance(error, UserError):
        log.error("error: %s", error)
    else:
        log.exception("this is a bug in the tool, please report it with the lines below")


def report_failure(error: Exception) -> None:
    """Log an error and write it to stderr. Call it while handling the error."""
    log_failure(error)
    error = as_user_error(error)
    if isinstance(error, UserError):
        write_final_error_line(f"error: {error}")
    else:
        write_final_error_line(
            f"error: a bug in the tool, please report it with the log: {type(error).__name__}: {error}"
        )


def write_final_error_line(text: str) -> None:
    """Write one line to stderr; the platform shows the last one for a failed job."""
    if sys.stderr is None:  # started with it closed
        return
    with suppress(OSError, ValueError):
        print(escape_invisible(" ".join(text.split())), file=sys.stderr, flush=True)


@contextmanager
def suppress_info_messages() -> Iterator[None]:
    """Hide info messages inside the block, unless --verbose was given."""
    ours = logging.getLogger("ensemble")
    level = ours.level
    if level != logging.DEBUG:
        ours.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        ours.setLevel(level)


class _Catcher:
    """Redirects the process's stderr while any thread asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking = 0
        self._kept = -1
        self._file: BinaryIO | None = None

    def begin(self) -> None:
        with self._lock:
            self._asking += 1
            if self._asking > 1:
                return
            with suppress(OSError):  # no folder for temporary files, or no stderr: then nothing is caught
                file = tempfile.TemporaryFile()  # noqa: SIM115
                try:
                    self._kept = os.dup(2)
                except OSError:
                    file.close()
                    raise
                self._file = file
                os.dup2(file.fileno(), 2)

    def end(self) -> None:
        with self._lock:
            self._asking -= 1
            if self._asking or self._file is None:
                return
            os.dup2(self._kept, 2)
            os.close(self._kept)
            with self._file as caught:
                self._file = None
                caught.seek(0)
                for line in caught.read().decode(errors="replace").strip().splitlines():
                    log.debug("image library: %s", line)


_catcher = _Catcher()


@contextmanager
def redirect_native_stderr() -> Iterator[None]:
    """Send what native libraries write to stderr to our log; several threads may do so at once."""
    _catcher.begin()
    try:
        yield
    finally:
        _catcher.end()
