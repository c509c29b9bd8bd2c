"""What hosted processes of the tests do; imports nothing heavy, since each process does so anew."""

from __future__ import annotations

import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from ensemble.child_process import run_child

MIB = 2**20


def page_faults() -> int:
    """Minor faults of taking 64 MiB, and of taking them again after they were freed: the latter."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = bytearray(64 * MIB)
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        del block
    return taken


def report(pipe: Connection) -> None:
    logging.getLogger("ensemble.some").debug("a detail")
    logging.getLogger("some.library").info("small talk")
    pipe.send((page_faults(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN))


def fail(pipe: Connection) -> None:
    raise ZeroDivisionError


def talk_to_nobody(pipe: Connection) -> None:
    pipe.close()
    raise BrokenPipeError


def sleep(pipe: Connection) -> None:
    try:
        pipe.send(os.getpid())
        time.sleep(60)
    finally:
        pipe.send("cleaned up")


def main(work: Callable[[Connection], None], pipe: Connection) -> None:
    run_child(lambda: work(pipe), logging.DEBUG)


def start(work: Callable[[Connection], None]) -> tuple[SpawnProcess, Connection]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(work, theirs))
    process.start()
    theirs.close()
    return process, ours
