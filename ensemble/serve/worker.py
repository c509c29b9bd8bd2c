"""The worker process: holds the networks and segments cases one after the other for its parent.

A process of its own, so that the parent answers while a network runs, can end it in the midst of anything, and outlives it when the
operating system kills it for its memory. The two exchange small messages over a pipe:

worker -> parent   WorkerReady, once; then an answer to each request
parent -> worker   a request: InvokeRequest, or what `WorkerConfig.segment` takes
either             the pipe's end: the other one is gone
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ensemble.child_process import run_child
from ensemble.config import ExtraOutputs, RunConfig
from ensemble.errors import UserError
from ensemble.logging_setup import log_failure
from ensemble.memory import as_user_error
from ensemble.text import TrustedLines, escape_invisible

if TYPE_CHECKING:
    from ensemble.pipeline import Ensemble, Watcher


@dataclass(frozen=True)
class WorkerConfig:
    """The configuration of a worker."""

    config: RunConfig
    extras: ExtraOutputs
    watcher: Watcher
    log_level: int = logging.INFO
    segment: Callable[[Any, Ensemble, WorkerConfig], dict[str, Any]] | None = None
    """What handles a request, a function of a module; None handles an InvokeRequest, a case of the contract."""


@dataclass(frozen=True)
class InvokeRequest:
    """Message from parent to worker: segment the case in `input_root`, write to `output_root`."""

    input_root: Path
    output_root: Path


@dataclass(frozen=True)
class WorkerReady:
    """Message from worker to parent: the networks are loaded and warmed up."""

    seconds: dict[str, float]
    """Parts of the start, in wall time: imports, weights, warm-up."""
    members: tuple[str, ...]


@dataclass(frozen=True)
class CaseDone:
    """Message from worker to parent: the outputs of a case are complete."""

    summary: dict[str, Any]


@dataclass(frozen=True)
class CaseFailed:
    """Message from worker to parent: why a case has no outputs. Also sent in place of WorkerReady if loading failed."""

    what: str
    exit_code: int = 1
    """The code that the exec mode would have ended with; 1 is a bug."""
    details: dict[str, str] = field(default_factory=dict)
    """where, found and do of a UserError, if it has them."""

    @classmethod
    def of(cls, error: Exception) -> CaseFailed:
        """Return an error as a message."""
        error = as_user_error(error)
        if not isinstance(error, UserError):
            return cls(f"a bug in the tool, please report it: {type(error).__name__}: {error}")
        details = {"where": error.where, "found": error.found, "do": error.do, "notes": "; ".join(error.notes)}
        return cls(error.what, error.exit_code, {name: text for name, text in details.items() if text})

    def __str__(self) -> str:
        lines = [self.what, *(f"{name}: {text}" for name, text in self.details.items())]
        return TrustedLines("\n  ".join(map(escape_invisible, lines)))


def serve_requests(connection: Connection, worker_config: WorkerConfig) -> NoReturn:
    """Load, warm up, and segment the parent's cases until it closes the pipe. The main function of the process."""
    run_child(lambda: _serve_requests(connection, worker_config), worker_config.log_level)


def _serve_requests(connection: Connection, worker_config: WorkerConfig) -> None:
    try:
        ensemble, ready = _load(worker_config)
    except Exception as error:
        log_failure(error)
        connection.send(CaseFailed.of(error))
        return
    connection.send(ready)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            answer: CaseDone | CaseFailed = CaseDone((worker_config.segment or _segment)(job, ensemble, worker_config))
        except Exception as error:
            log_failure(error)
            answer = CaseFailed.of(error)
        connection.send(answer)


def _load(worker_config: WorkerConfig) -> tuple[Ensemble, WorkerReady]:
    started = time.perf_counter()
    from ensemble.contract import execute  # noqa: F401  (imports belong to the start, not to the first case)
    from ensemble.pipeline import load_from_config
    from ensemble.serve.warmup import warm_up

    imported = time.perf_counter()
    ensemble = load_from_config(worker_config.config)
    loaded = time.perf_counter()
    warm_up(ensemble)
    warm = time.perf_counter()
    seconds = {"imports": imported - started, "weights": loaded - imported, "warm-up": warm - loaded}
    rounded = {part: round(value, 3) for part, value in seconds.items()}
    return ensemble, WorkerReady(rounded, tuple(member.name for member in ensemble.members))


def _segment(job: InvokeRequest, ensemble: Ensemble, worker_config: WorkerConfig) -> dict[str, Any]:
    from ensemble.contract.execute import run_case
    from ensemble.contract.isles22 import find_inputs

    started = time.perf_counter()
    found = find_inputs(job.input_root)
    result = run_case(found, job.output_root, lambda: ensemble, worker_config.extras, worker_config.watcher)
    return {
        "case": found.name,
        "outputs": found.results[0]["outputs"],
        "voted": list(result.fused.voters),
        "lesions": result.lesion_count,
        "lesion_ml": round(result.lesion_ml, 4),
        "seconds": round(time.perf_counter() - started, 3),
    }
