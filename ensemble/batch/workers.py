"""A process for each GPU; they share the cases as strangers would, through the locks of the output folder."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import NoReturn

from ensemble.batch.case_loop import BatchPlan, Outcome, segment_cases
from ensemble.batch.claims import BatchClaims
from ensemble.batch.identity import result_key
from ensemble.batch.layouts import FoundCase
from ensemble.child_process import run_child
from ensemble.config import Device
from ensemble.errors import MembersFailed, OutOfMemory, UserError
from ensemble.folders import unwritable
from ensemble.memory import MORE_MEMORY
from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.pipeline import load
from ensemble.progress import SilentWatcher

log = logging.getLogger(__name__)

#: Exit codes of a process that found no memory, or was killed for it.
_FOR_MEMORY = (OutOfMemory.exit_code, -signal.SIGKILL)

Cases = Sequence[tuple[FoundCase, BidsEntities]]


def gpus(device: Device) -> tuple[str, ...]:
    """`CUDA_VISIBLE_DEVICES` for a process each, one for every GPU that may be used; empty when there is none."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(named.split(",")) if named else tuple(map(str, range(torch.cuda.device_count())))


def work_on_each(visible: Sequence[str], job: BatchPlan, cases: Cases, tell: Callable[[Outcome], None]) -> None:
    """Let a process for each entry of `visible` work until all cases have come to an end.

    A process that dies leaves its case to the others. Raises what a process raised that a user can act on; when all died MembersFailed, or
    OutOfMemory where one was killed for its memory.
    """
    context = multiprocessing.get_context("spawn")
    processes, ends = [], []
    try:
        for devices in visible:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(devices, job, cases, theirs, log.getEffectiveLevel()))
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        ended: set[str] = set()
        open_ends: list[Connection] = list(ends)
        while open_ends:
            for end in wait(open_ends):
                assert isinstance(end, Connection)
                try:
                    said = end.recv()
                except EOFError:
                    open_ends.remove(end)
                    continue
                if isinstance(said, UserError):
                    raise said
                ended.add(said.case)
                tell(said)
        for process, devices in zip(processes, visible, strict=True):
            process.join()
            if process.exitcode:
                log.error("the process on GPU %s died (exit code %s)", devices, process.exitcode)
        if missing := len(cases) - len(ended):
            what = f"{missing} cases were left when all processes had died"
            if any(process.exitcode in _FOR_MEMORY for process in processes):
                found = "the operating system kills processes when memory runs out"
                raise OutOfMemory(what, found=found, do=f"{MORE_MEMORY}; then run the batch again")
            raise MembersFailed(what, do="run the batch again")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _main(visible: str, job: BatchPlan, cases: Cases, tell: Connection, level: int) -> NoReturn:
    run_child(lambda: _serve(visible, job, cases, tell), level)


def _serve(visible: str, job: BatchPlan, cases: Cases, tell: Connection) -> None:
    """What each process does."""
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    try:
        session = BatchClaims(job.root, result_key(job.recipe, {}))
        try:
            segment_cases(job, session, cases, lambda: load(job.config), SilentWatcher(), tell.send)
        finally:
            session.leave()
    except UserError as error:
        tell.send(error)
    except OSError as error:
        tell.send(unwritable(job.root, error))
