"""`batch DATASET OUT`: every case of a dataset into a tree of BIDS derivatives."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ensemble.batch.case_loop import BatchPlan, Outcome, segment_cases
from ensemble.batch.claims import BatchClaims
from ensemble.batch.find import find_cases
from ensemble.batch.identity import recipe, result_key
from ensemble.batch.progress import BatchProgress, open_progress
from ensemble.batch.summary import Row, rows, write_summary
from ensemble.batch.workers import gpus, work_on_each
from ensemble.config import ExtraOutputs, RunConfig
from ensemble.folders import unwritable
from ensemble.inference.device import resolve_device
from ensemble.logging_setup import write_final_error_line
from ensemble.members.manifest import find_members, weight_digests
from ensemble.outputs.layouts.bids import describe_tree, refuse_foreign_tree
from ensemble.outputs.layouts.bids_entities import assign_entities
from ensemble.pipeline import load

log = logging.getLogger(__name__)

#: Exit codes of failed cases, worst first: the batch ends with the worst that came up.
_WORST_FIRST = (1, 137, 4, 2, 5, 3)


def batch(
    dataset: Path,
    out: Path,
    config: RunConfig,
    extras: ExtraOutputs,
    *,
    resume: bool = True,
    workers: tuple[str, ...] = (),
) -> int:
    """Segment every case of `dataset` below `out`. Returns the exit code: 0, or the worst that a failed case has.

    `workers` names a `CUDA_VISIBLE_DEVICES` for each process to be started; by default there is one process a GPU, or this one.
    Raises InputRefused when there is no case, WeightsBroken, and UsageError when results can't be written or there is no such device.
    """
    refuse_foreign_tree(out, dataset)
    cases = find_cases(dataset, out)
    places = assign_entities([case.name for case in cases])
    specs = find_members(config.weights_folder, config.members)
    digests = {spec.name: weight_digests(spec) for spec in specs}
    job = BatchPlan(out, config, extras, recipe(specs, digests, config, extras), resolve_device(config.device), resume)
    workers = workers or gpus(config.device)
    outcomes: dict[str, Outcome] = {}
    try:
        session = BatchClaims(out, result_key(job.recipe, {}))
        try:
            describe_tree(out, session.folder, dataset)
            log.info("%d cases in %s", len(cases), dataset)
            paired = [(case, places[case.name]) for case in cases]
            try:
                with closing(open_progress(len(cases))) as shown:
                    tell = _Teller(outcomes, shown)
                    if len(workers) > 1:
                        work_on_each(workers, job, paired, tell)
                    else:
                        segment_cases(job, session, paired, lambda: load(config), shown, tell)
            finally:  # also what was interrupted has a summary
                table = rows(out, places, outcomes)
                write_summary(out, session.folder, table)
        finally:
            session.leave()
    except OSError as error:
        raise unwritable(out, error) from error
    return _close(out, table, outcomes)


@dataclass(frozen=True)
class _Teller:
    """Keeps the first outcome of each case, and passes it on: of processes that share the work, each has one for every case."""

    outcomes: dict[str, Outcome]
    shown: BatchProgress

    def __call__(self, outcome: Outcome) -> None:
        if outcome.case not in self.outcomes:
            self.outcomes[outcome.case] = outcome
            self.shown.tell(outcome)


def _close(out: Path, table: list[Row], outcomes: dict[str, Outcome]) -> int:
    counts = {status: sum(row.status == status for row in table) for status in ("done", "failed")}
    kept = sum(outcome.status == "kept" for outcome in outcomes.values())
    log.info(
        "%d cases done (%d of them before or by another process), %d failed", counts["done"], kept, counts["failed"]
    )
    for name in ("summary.csv", "index.html"):
        log.info("  %s", out / name)
    if counts["failed"]:
        write_final_error_line(
            f"error: {counts['failed']} of {len(table)} cases failed: {out / 'summary.csv'} says why"
        )
    codes = {outcome.exit_code for outcome in outcomes.values() if outcome.status == "failed"}
    return next((code for code in _WORST_FIRST if code in codes), max(codes, default=0))
