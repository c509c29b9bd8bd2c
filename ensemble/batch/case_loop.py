"""One process's share of a batch. It reads ahead while networks run; a case that fails does not stop the others."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ensemble.batch import failures
from ensemble.batch.case_list import search_again_advice
from ensemble.batch.claims import BatchClaims, FileLock
from ensemble.batch.identity import input_digests, input_stamps, result_key
from ensemble.batch.layouts import FoundCase
from ensemble.config import ExtraOutputs, RunConfig
from ensemble.errors import InputRefused, UsageError, UserError, WeightsBroken
from ensemble.memory import as_user_error
from ensemble.outputs.artifacts import SegmentedCase
from ensemble.outputs.dicom.study import require_one_study
from ensemble.outputs.layouts.bids import move_to_superseded, read_report, refuse_occupied_case_folder, write_case
from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.pipeline import Ensemble, Result, Watcher, segment_prepared
from ensemble.prepare.case import PreparedCase, prepare_for_run
from ensemble.progress import SilentWatcher
from ensemble.readers.base import RawCase
from ensemble.readers.imagefile import read_case_files
from ensemble.readers.sources import Stamp, file_stamp
from ensemble.text import escape_invisible

log = logging.getLogger(__name__)

#: Seconds to wait before claiming a case again that another process holds.
_PATIENCE = 0.5


@dataclass(frozen=True)
class BatchPlan:
    """The output folder and options of a batch, the same for every case."""

    root: Path
    config: RunConfig
    extras: ExtraOutputs
    recipe: Mapping[str, Any]
    device: str = "cpu"
    """Torch device on which skulls are stripped."""
    resume: bool = True
    """Whether up-to-date results are kept."""


@dataclass(frozen=True)
class CaseOutcome:
    """How a case of a batch ended: done, kept from an earlier run, or failed."""

    case: str
    status: Literal["done", "kept", "failed"]
    message: str = ""
    """Why it failed; text from outside is escaped."""
    exit_code: int = 0
    """The exit code that a run of this case alone would have had."""


@dataclass(frozen=True)
class _Task:
    """A case that is being processed."""

    case: FoundCase
    entities: BidsEntities
    lock: FileLock
    raw: RawCase
    prepared: PreparedCase
    prepare_seconds: float
    made_of: Mapping[str, Any]
    stale: bool
    """Whether the output folder holds an earlier result of this case, made from other inputs."""


def segment_cases(
    plan: BatchPlan,
    claims: BatchClaims,
    cases: Sequence[tuple[FoundCase, BidsEntities]],
    load: Callable[[], Ensemble],
    watcher: Watcher,
    tell: Callable[[CaseOutcome], None],
) -> None:
    """Process all cases, sharing them with other processes that work on the same output folder; return when each is done or failed.

    `load` is called once, for the first case that needs networks. Raises UsageError when results can't be written, WeightsBroken when
    the networks can't be loaded, since every other case would fail as well.
    """
    ensemble: Ensemble | None = None
    writing: deque[Future[CaseOutcome]] = deque()
    reader, writer = ThreadPoolExecutor(1, "reader"), ThreadPoolExecutor(1, "writer")
    try:
        waiting = list(cases)
        while waiting:
            others = []
            for (case, entities), taken in _ahead(reader, lambda item: _take(plan, claims, *item), waiting):
                if taken is None:
                    others.append((case, entities))
                elif isinstance(taken, CaseOutcome):
                    tell(taken)
                else:
                    ensemble = ensemble or load()
                    writing.append(writer.submit(_finish, plan, claims, taken, *_segment(taken, ensemble, watcher)))
                while len(writing) > 1 or (writing and writing[0].done()):
                    tell(writing.popleft().result())
            while writing:
                tell(writing.popleft().result())
            waiting = others
            if others:
                time.sleep(_PATIENCE)
    finally:
        reader.shutdown(cancel_futures=True)
        writer.shutdown()  # predictions in memory are still written when the batch is interrupted
        for future in writing:
            if future.exception() is None:
                tell(future.result())


Item = TypeVar("Item")
Taken = TypeVar("Taken")


class CaseWorker:
    """Keeps networks loaded and processes cases from several threads: one case is read while another is being segmented."""

    def __init__(self, plan: BatchPlan, claims: BatchClaims, load: Callable[[], Ensemble]) -> None:
        self._plan, self._claims, self._load = plan, claims, load
        self._reading, self._networks, self._writing = threading.Lock(), threading.Lock(), threading.Lock()

    def load(self) -> None:
        """Load the networks. Raises as `pipeline.load_from_config` does."""
        self._ensemble = self._load()

    def __call__(self, case: FoundCase, entities: BidsEntities) -> CaseOutcome | None:
        """Process a case completely; None while another process holds it. Raises as `segment_cases` does."""
        with self._reading:
            taken = _take(self._plan, self._claims, case, entities)
        if not isinstance(taken, _Task):
            return taken
        with self._networks:
            predicted = _segment(taken, self._ensemble, SilentWatcher())
        with self._writing:
            return _finish(self._plan, self._claims, taken, *predicted)


def record_process_death(
    plan: BatchPlan, claims: BatchClaims, case: FoundCase, entities: BidsEntities, error: UserError
) -> CaseOutcome:
    """Record the failure of a case whose process died before it could record it."""
    report, stale = read_report(plan.root, entities), True
    with suppress(InputRefused):
        stale = report is not None and report["batch"].get("key") != result_key(plan.recipe, input_digests(case.files))
    return _failed(plan, claims, case, entities, error, stale=stale)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Taken], items: Sequence[Item]
) -> Iterator[tuple[Item, Taken]]:
    """Apply a function to items in another thread, staying one item ahead of the consumer."""
    started: deque[tuple[Item, Future[Taken]]] = deque()
    for item in items:
        started.append((item, pool.submit(function, item)))
        if len(started) > 1:
            first, future = started.popleft()
            yield first, future.result()
    for item, future in started:
        yield item, future.result()


def _take(plan: BatchPlan, claims: BatchClaims, case: FoundCase, entities: BidsEntities) -> _Task | CaseOutcome | None:
    """Claim a case, check whether anything is to be done, then read and prepare it; None while another process has it."""
    lock = claims.claim(entities)
    if lock is None:
        return None
    stale = False
    outcome: _Task | CaseOutcome | None = None
    try:
        if (noted := claims.failure(entities)) is not None:
            outcome = CaseOutcome(case.name, "failed", **noted)
        else:
            stale = _is_left_over(plan, case, entities)
            if case.problem is not None:
                raise case.problem
            refuse_occupied_case_folder(plan.root, entities)
            before = input_stamps(case.files)
            inputs = input_digests(case.files)
            key = result_key(plan.recipe, inputs)
            report = read_report(plan.root, entities)
            stale = report is not None and report["batch"].get("key") != key
            if report is not None and not stale and (plan.resume or claims.is_done(entities)):
                failures.remove_failure(plan.root, entities)
                outcome = CaseOutcome(case.name, "kept")
            else:
                made_of = {"key": key, "inputs": inputs, "recipe": plan.recipe}
                raw = _noting(read_case_files(case.name, case.files), case)
                _refuse_changed(case, before)
                require_one_study(raw, plan.extras)
                started = time.perf_counter()
                prepared = prepare_for_run(raw, plan.config, plan.device)
                seconds = round(time.perf_counter() - started, 3)
                outcome = _Task(case, entities, lock, raw, prepared, seconds, made_of, stale)
    except Exception as error:
        reason = _gone(case) if isinstance(error, InputRefused) else None
        outcome = _failed(plan, claims, case, entities, reason or error, stale=stale)
    finally:
        if not isinstance(outcome, _Task):
            claims.release(lock)
    return outcome


def _noting(raw: RawCase, case: FoundCase) -> RawCase:
    """Return the case with notes on why these files were chosen, where there were several candidates."""
    images = {
        modality: replace(image, notes=(case.notes[modality], *image.notes)) if modality in case.notes else image
        for modality, image in raw.images.items()
    }
    return replace(raw, images=images)


def _is_left_over(plan: BatchPlan, case: FoundCase, entities: BidsEntities) -> bool:
    """Return whether an earlier result exists although some images were removed since, or no longer form a case.

    If all images were removed, the result stays.
    """
    gone = [file_stamp(path) is None for path in case.files.values()]
    changed = not all(gone) and (any(gone) or case.problem is not None)
    return changed and read_report(plan.root, entities) is not None


def _segment(task: _Task, ensemble: Ensemble, watcher: Watcher) -> tuple[Ensemble, Result | Exception]:
    try:
        return ensemble, segment_prepared(task.prepared, ensemble, watcher, {"prepare": task.prepare_seconds})
    except Exception as error:
        return ensemble, error


def _finish(
    plan: BatchPlan, claims: BatchClaims, task: _Task, ensemble: Ensemble, result: Result | Exception
) -> CaseOutcome:
    """Write the outputs of a case, or record its failure, and release its lock. Raises as `segment_cases` does."""
    try:
        if isinstance(result, Exception):
            raise result
        case = SegmentedCase.of(task.raw, result, ensemble, plan.extras)
        failures.remove_failure(plan.root, task.entities)  # first, since the process may be killed after either step
        write_case(plan.root, claims.folder, task.entities, case, plan.extras, task.made_of)
        claims.note_done(task.entities)
        return CaseOutcome(task.case.name, "done")
    except Exception as error:
        return _failed(plan, claims, task.case, task.entities, error, stale=task.stale)
    finally:
        claims.release(task.lock)


def _failed(
    plan: BatchPlan, claims: BatchClaims, case: FoundCase, entities: BidsEntities, error: Exception, *, stale: bool
) -> CaseOutcome:
    """Record a failure. An earlier result made from other inputs is moved aside, so that it can't be taken for this case's.

    Raises errors that do not concern the case: UsageError, WeightsBroken.
    """
    if isinstance(error, UsageError | WeightsBroken):
        raise error
    error = as_user_error(error)
    if isinstance(error, UserError):
        message, code = str(error), error.exit_code
    else:
        log.error("case %s: a bug in the tool, please report it with the lines below", case.name, exc_info=error)
        message, code = escape_invisible(f"a bug: {type(error).__name__}: {error}"), 1
    if stale and (aside := move_to_superseded(plan.root, entities)):
        message += f"\n  note: an earlier result, made from other inputs, was moved to {escape_invisible(str(aside))}"
    elif (plan.root / entities.folder).is_dir():
        message += f"\n  note: an earlier result remains in {entities.folder}"
    failure = {"message": message, "exit_code": code}
    claims.note_failure(entities, failure)
    failures.record_failure(plan.root, claims.folder, entities, case.name, failure)
    return CaseOutcome(case.name, "failed", message, code)


def _gone(case: FoundCase) -> InputRefused | None:
    """Return the error for a case if an image found by an earlier search is gone; None if all are there."""
    for modality, path in case.files.items() if case.listed else ():
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return InputRefused(
                f"the {modality.label} image has gone since the dataset was searched",
                where=path,
                found=f"it was there on {case.listed}",
                do=f"restore it; or, if it was moved or removed on purpose, {search_again_advice()}",
            )
        except OSError:  # the original error says more
            pass
    return None


def _refuse_changed(case: FoundCase, before: dict[Path, Stamp | None]) -> None:
    if input_stamps(case.files) != before:
        raise InputRefused(
            "an image file changed while it was being read",
            where=", ".join(map(str, case.files.values())),
            do="run the batch again when all files have been copied",
        )
