"""Set-up of the child process that holds the networks for a server."""

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

from ensemble.errors import UserError
from ensemble.logging_setup import log_failure, set_up_logging
from ensemble.memory import as_user_error, keep_freed_memory

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_child(work: Callable[[], None], log_level: int) -> NoReturn:
    """Run the main function of a child process: set it up as `process.py` does the parent, run `work`, and exit.

    It keeps freed memory, logs as the parent does, and ends with the parent. Its exit code is 0, that of a SystemExit or UserError, or 1.
    """
    code = 1
    try:
        _end_with_the_parent()
        keep_freed_memory()
        set_up_logging(log_level)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BrokenPipeError:  # the parent has ended, so there is no process to report to
        pass
    except Exception as error:
        log_failure(error)
        seen = as_user_error(error)
        code = seen.exit_code if isinstance(seen, UserError) else 1
    except BaseException:
        log.exception("this is a bug in the tool, please report it with the lines below")
    finally:
        # at once: shutting down an interpreter with torch takes longer than SIGTERM allows, and a second SIGTERM would disturb it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def _end_with_the_parent() -> None:
    """Turn SIGTERM into an exception so that partial outputs are removed; the kernel sends it if the parent dies.

    SIGINT from a terminal goes to the parent and to its processes alike: the parent decides.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before PDEATHSIG was set
        raise SystemExit(128 + signal.SIGTERM)
