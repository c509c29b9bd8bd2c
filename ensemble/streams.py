"""Where messages go: to stdout, since a line on stderr marks a job on grand-challenge with a warning."""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def native_stderr_to_log() -> Iterator[None]:
    """Send to our log what native libraries write to the process's stderr by themselves."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr to keep clean
        yield
        return
    with tempfile.TemporaryFile() as catcher:
        os.dup2(catcher.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            catcher.seek(0)
            if said := catcher.read().decode(errors="replace").strip():
                log.debug("image library: %s", said)
