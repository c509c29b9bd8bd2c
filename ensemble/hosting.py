"""A process that holds networks and works for a parent: the server's worker, and those of a batch."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from ensemble.memory import keep_freed_memory
from ensemble.streams import messages_to_stdout

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def host(work: Callable[[], None], log_level: int) -> NoReturn:
    """Be the main function of such a process: set it up as `process.py` sets up the parent, work, and end it.

    It keeps freed memory, logs as the parent does, and ends with it. Its exit code is 0, what a SystemExit says, or 1 for a bug.
    """
    code = 1
    try:
        _end_with_the_parent()
        keep_freed_memory()
        messages_to_stdout(log_level)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BrokenPipeError:  # the parent has gone, and nobody is left to tell
        pass
    except BaseException:
        log.exception("this is a bug in the tool, please report it with the lines below")
    finally:
        # at once: taking a whole interpreter with torch down takes time that SIGTERM does not leave, and a second SIGTERM would disturb it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def _end_with_the_parent() -> None:
    """SIGTERM ends this process as an error would, so that half-written outputs go; it comes from the parent, or from its death.

    SIGINT from a terminal goes to the parent and to its processes alike: the parent decides.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before it was asked to tell
        raise SystemExit(128 + signal.SIGTERM)
