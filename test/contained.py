"""A call in a process of its own: what it raised, how much processor time it took, and how much memory it grew by."""

from __future__ import annotations

import os
import pickle
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ensemble.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """What became of a call."""

    kind: str
    """Class of what it raised; empty when it returned."""
    text: str
    exit_code: int
    """Of a UserError; 0 when it returned, 1 for anything else."""
    grown_mb: float
    cpu_seconds: float
    """Others on the machine make a call last longer, but not cost more."""


def contained(call: Callable[[], object], seconds: int = 30) -> Outcome:
    """Make a call in a forked process, which ends after so many seconds: a call that hangs fails the test."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        torch.set_num_threads(1)  # a forked process has none of the threads that its parent's OpenMP would wait for
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kind, text, code = "", "", 0
        try:
            call()
        except BaseException as error:
            kind, text, code = type(error).__name__, str(error), error.exit_code if isinstance(error, UserError) else 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump((kind, text, code, grown), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status, used = os.wait4(child, 0)
    assert not os.WIFSIGNALED(status), f"it hung, or was killed by signal {os.WTERMSIG(status)}"
    kind, text, code, grown = pickle.loads(answer)
    return Outcome(kind, text, code, grown, used.ru_utime + used.ru_stime)


def assert_refused(outcome: Outcome, exit_code: int, *said: str, most_mb: float = 150, most_s: float = 8) -> None:
    """That a call was refused with a code and some words, without much memory or processor time."""
    assert outcome.exit_code == exit_code, outcome
    assert all(words in outcome.text for words in said), outcome
    assert outcome.grown_mb < most_mb, outcome
    assert outcome.cpu_seconds < most_s, outcome
