"""Runs the process that holds the networks for `listen`: one study at a time, restarted if it dies."""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble.errors import OutOfMemory, UserError, WeightsBroken
from ensemble.serve.worker import CaseDone, CaseFailed, WorkerConfig, WorkerReady, serve_requests

if TYPE_CHECKING:
    from ensemble.pipeline import Ensemble

log = logging.getLogger(__name__)

_GRACE_S = 5.0


@dataclass(frozen=True)
class StudyJob:
    """A study to segment: the folder of its images, and the folder for its results."""

    name: str
    images: Path
    results: Path
    scratch: Path


class ProcessDied(Exception):
    """The segmenting process died during a study; the message states how."""


class SegmentationProcess:
    """Runs the process that segments studies, and talks to it. To be used from one thread only."""

    def __init__(self, worker_config: WorkerConfig) -> None:
        self._worker_config = worker_config
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self.ready: WorkerReady | None = None

    def open(self) -> None:
        """Start the process, and wait until its networks are loaded. Raises the error of a failed load."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve_requests, args=(theirs, self._worker_config), daemon=True, name="worker"
        )
        self._process.start()
        theirs.close()
        try:
            answer = self._connection.recv()
        except EOFError:
            answer = CaseFailed("the members could not be loaded", WeightsBroken.exit_code, {"found": self._end()})
        if isinstance(answer, CaseFailed):
            self.close()
            raise _as_error(answer)
        self.ready = answer

    def segment(self, job: StudyJob) -> CaseDone | CaseFailed:
        """Segment a study. Raises ProcessDied if the process dies."""
        if self._process is None:
            self.open()
        assert self._connection is not None
        try:
            self._connection.send(job)
            answer: CaseDone | CaseFailed = self._connection.recv()
        except (EOFError, OSError) as error:
            how = self._end()
            self.close()
            raise ProcessDied(how) from error
        return answer

    def close(self) -> None:
        """End the process, even if it is busy."""
        self.ready = None
        if self._process is not None:
            self._process.terminate()
            self._process.join(_GRACE_S)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _end(self) -> str:
        assert self._process is not None
        self._process.join(_GRACE_S)
        return f"exit code {self._process.exitcode}"


def segment_job(job: StudyJob, ensemble: Ensemble, worker_config: WorkerConfig) -> dict[str, Any]:
    """Segment a study inside the process. Returns the summary for the parent."""
    from ensemble.hospital.study import segment_to_send

    case = segment_to_send(
        job.images, job.name, (job.results, job.scratch), worker_config.extras, ensemble, worker_config.watcher
    )
    return {"lesions": case.result.lesion_count, "lesion_ml": round(case.result.lesion_ml, 4)}


def _as_error(failed: CaseFailed) -> UserError:
    kinds = {kind.exit_code: kind for kind in (WeightsBroken, OutOfMemory)}
    told = {name: failed.details.get(name, "") for name in ("where", "found", "do")}
    return kinds.get(failed.exit_code, UserError)(failed.what, **told)
