"""Where messages go: to stdout, since a line on stderr marks a job on grand-challenge with a warning; the last word on a failure, in one
line, also to stderr, since the platform shows its user the last line of it. And names that no text can hold.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from ensemble.errors import UserError

log = logging.getLogger(__name__)


def messages_to_stdout(level: int = logging.INFO) -> None:
    """Our messages from `level` on, those of libraries from warnings on; names that stdout can't spell, or a reader who has gone, are
    no reason to fail."""
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s", force=True)
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    logging.getLogger("ensemble").setLevel(level)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def log_failure(error: Exception) -> None:
    """Log why a case or a call failed; of a bug the traceback, too. Call it while handling the error."""
    if isinstance(error, UserError):
        log.error("error: %s", error)
    else:
        log.exception("this is a bug in the tool, please report it with the lines below")


def report_failure(error: Exception) -> None:
    """Log it, and say it on stderr. Call it while handling the error."""
    log_failure(error)
    if isinstance(error, UserError):
        last_word(f"error: {error}")
    else:
        last_word(f"error: a bug in the tool, please report it with the log: {type(error).__name__}: {error}")


def last_word(text: str) -> None:
    """Write one line to stderr: what the platform shows of a job that failed."""
    if sys.stderr is None:  # started with it closed
        return
    with suppress(OSError, ValueError):
        print(" ".join(printable(text).split()), file=sys.stderr, flush=True)


@contextmanager
def only_warnings() -> Iterator[None]:
    """Keep messages below a warning from the log, unless all were asked for (--verbose)."""
    ours = logging.getLogger("ensemble")
    level = ours.level
    if level != logging.DEBUG:
        ours.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        ours.setLevel(level)


def printable(text: str) -> str:
    """Text that UTF-8 can hold: bytes of a file's name that are none (Latin-1, say) reach Python as lone surrogates, and become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def all_printable(content: Any) -> Any:
    """The same for every text, keys included, in what is to become JSON."""
    if isinstance(content, dict):
        return {all_printable(key): all_printable(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [all_printable(value) for value in content]
    return printable(content) if isinstance(content, str) else content


class _Catcher:
    """Takes the process's stderr for as long as any thread asks for it."""

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
                if said := caught.read().decode(errors="replace").strip():
                    log.debug("image library: %s", said)


_catcher = _Catcher()


@contextmanager
def native_stderr_to_log() -> Iterator[None]:
    """Send to our log what native libraries write to the process's stderr by themselves; any number of threads may do so at once."""
    _catcher.begin()
    try:
        yield
    finally:
        _catcher.end()
