"""`batch DATASET OUT`, and the levels of a BIDS App: every case of a dataset, or some, into a tree of BIDS derivatives."""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ensemble.batch import failures
from ensemble.batch.case_loop import BatchPlan, Outcome, segment_cases
from ensemble.batch.claims import BatchClaims
from ensemble.batch.find import find_cases
from ensemble.batch.identity import recipe, result_key
from ensemble.batch.layouts import FoundImage
from ensemble.batch.on_ray import INSTALL, LOCAL, gpu_count, is_installed, segment_on_ray
from ensemble.batch.parquet import FILE as PARQUET
from ensemble.batch.parquet import parquet as as_parquet
from ensemble.batch.parquet import refuse_without_pyarrow
from ensemble.batch.progress import BatchProgress, open_progress
from ensemble.batch.selection import Placed, Selection
from ensemble.batch.summary import Summary, collect, write_summary
from ensemble.config import Device, ExtraOutputs, RunConfig
from ensemble.folders import unwritable
from ensemble.inference.device import resolve_device
from ensemble.logging_setup import write_final_error_line
from ensemble.members.manifest import find_members, weight_digests
from ensemble.outputs.layouts.bids import FAILED, describe_tree, refuse_foreign_tree
from ensemble.outputs.layouts.bids_entities import BidsEntities, assign_entities
from ensemble.pipeline import load
from ensemble.program import command
from ensemble.publish import replace_bytes

log = logging.getLogger(__name__)

#: Exit codes of failed cases, worst first: the batch ends with the worst that came up.
_WORST_FIRST = (1, 137, 4, 2, 5, 3)
#: What `group` ends with where cases have neither a result nor a failure on record.
_NOT_DONE = 3


@dataclass(frozen=True)
class Dataset:
    """What cases there are, and which of them this call works on."""

    path: Path
    selection: Selection = field(default_factory=Selection)
    wanted: Callable[[FoundImage], bool] = lambda image: True
    """Which of its images may be taken."""

    def find(self, out: Path) -> tuple[dict[str, BidsEntities], list[Placed]]:
        """Return the place of every case, and the selected cases. Raises InputRefused."""
        cases = find_cases(self.path, out, self.wanted)
        places = assign_entities([case.name for case in cases])
        return places, self.selection.of(cases, places, self.path)


def batch(
    dataset: Path | Dataset,
    out: Path,
    config: RunConfig,
    extras: ExtraOutputs,
    *,
    resume: bool = True,
    summarise: bool = True,
    parquet: bool = False,
    ray: str | None = None,
    ray_cpus: int = 4,
) -> int:
    """Segment the cases of `dataset` below `out`. Returns the exit code: 0, or the worst that a failed case has.

    Where others work on the rest of the dataset, they `summarise` together, by `group`; with `parquet`, as Parquet too. `ray` is the
    address of a cluster that does the work, with `ray_cpus` for each process; several GPUs of this machine use one of their own. Raises
    InputRefused when there is no case, WeightsBroken, and UsageError when results can't be written or there is no such device.
    """
    of = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    if parquet and summarise:
        refuse_without_pyarrow()
    refuse_foreign_tree(out, of.path)
    places, selected = of.find(out)
    specs = find_members(config.weights_folder, config.members)
    digests = {spec.name: weight_digests(spec) for spec in specs}
    ray = ray or _for_gpus(config.device)
    device = "cpu" if ray else resolve_device(config.device)
    job = BatchPlan(out, config, extras, recipe(specs, digests, config, extras), device, resume)
    outcomes: dict[str, Outcome] = {}
    try:
        session = BatchClaims(out, result_key(job.recipe, {}))
        try:
            describe_tree(out, session.folder, of.path)
            log.info("%d cases in %s", len(selected), of.path)
            try:
                with closing(open_progress(len(selected))) as shown:
                    tell = _Teller(outcomes, shown)
                    if ray:
                        segment_on_ray(ray, ray_cpus, job, session, selected, partial(load, config), tell)
                    else:
                        segment_cases(job, session, selected, lambda: load(config), shown, tell)
            finally:  # also what was interrupted has a summary
                if summarise:
                    _summarise(out, session, collect(out, places, outcomes), parquet=parquet)
        finally:
            session.leave()
    except OSError as error:
        raise unwritable(out, error) from error
    _tell_end(out, len(selected), outcomes, summarised=summarise, parquet=parquet)
    if not summarise:
        log.info(
            "  the summary of all, once the others have ended: %s",
            command(f"{shlex.join([str(of.path), str(out)])} group"),
        )
    return _worst(outcomes)


def _for_gpus(device: Device) -> str | None:
    """Return that Ray is to share the work among several GPUs of this machine; None where there are none, or no Ray."""
    if (count := gpu_count(device)) < 2:
        return None
    if is_installed():
        return LOCAL
    log.warning(
        "note: one of %d GPUs works. All do with Ray (%s), or with the same call once more for each:"
        " CUDA_VISIBLE_DEVICES=1 %s, and so on",
        count, INSTALL, command("batch ..."),
    )  # fmt: skip
    return None


def group(dataset: Dataset, out: Path, *, parquet: bool = False) -> int:
    """Summarise what calls on parts of `dataset` have left below `out`: `summary.csv` and `index.html` of all its cases.

    With `parquet`, `summary.parquet` too.

    Returns the worst exit code that a failed case has, 3 where cases are not done, or 0. Raises as `batch` does.
    """
    if parquet:
        refuse_without_pyarrow()
    refuse_foreign_tree(out, dataset.path)
    places, _ = dataset.find(out)
    recorded = failures.recorded(out, places.items())
    failed = {name: Outcome(name, "failed", **noted) for name, noted in recorded.items()}
    outcomes = {name: failed.get(name, Outcome(name, "kept")) for name in places}
    try:
        session = BatchClaims(out, "group")
        try:
            describe_tree(out, session.folder, dataset.path)
            found = collect(out, places, outcomes)
            _summarise(out, session, found, parquet=parquet)
        finally:
            session.leave()
    except OSError as error:
        raise unwritable(out, error) from error
    if found.ways > 1:
        log.warning(
            "note: the results were made in %d ways (version, options or weights). participant makes anew what was not made as it is asked",
            found.ways,
        )
    waiting = {row.case for row in found.rows if row.status == "not done"}
    _tell_end(
        out,
        len(places),
        {name: outcomes[name] for name in outcomes if name not in waiting},
        summarised=True,
        parquet=parquet,
    )
    if waiting:
        undone = f"{len(waiting)} of {len(places)} cases are not done: {out / 'summary.csv'} says which"
        write_final_error_line(f"error: {undone}") if not failed else log.info("%s", undone)
    return _worst(failed) or (_NOT_DONE if waiting else 0)


def _summarise(out: Path, session: BatchClaims, found: Summary, *, parquet: bool) -> None:
    """Write the summary in all its forms that are asked for. Raises OSError."""
    write_summary(out, session.folder, found.rows)
    if parquet:
        replace_bytes(out / PARQUET, as_parquet(found.rows), session.folder)
    elif (out / PARQUET).exists():
        log.warning("note: %s is of an earlier call: --parquet writes it anew", out / PARQUET)


@dataclass(frozen=True)
class _Teller:
    """Keeps the first outcome of each case, and passes it on: of processes that share the work, each has one for every case."""

    outcomes: dict[str, Outcome]
    shown: BatchProgress

    def __call__(self, outcome: Outcome) -> None:
        if outcome.case not in self.outcomes:
            self.outcomes[outcome.case] = outcome
            self.shown.tell(outcome)


def _tell_end(out: Path, cases: int, outcomes: Mapping[str, Outcome], *, summarised: bool, parquet: bool) -> None:
    counts = Counter(outcome.status for outcome in outcomes.values())
    log.info(
        "%d cases done (%d of them before or by another process), %d failed",
        *(counts["done"] + counts["kept"], counts["kept"], counts["failed"]),
    )
    if summarised:
        for name in ("summary.csv", *([PARQUET] if parquet else []), "index.html"):
            log.info("  %s", out / name)
    if counts["failed"]:
        says = out / ("summary.csv" if summarised else FAILED)
        write_final_error_line(f"error: {counts['failed']} of {cases} cases failed: {says} says why")


def _worst(outcomes: Mapping[str, Outcome]) -> int:
    codes = {outcome.exit_code for outcome in outcomes.values() if outcome.status == "failed"}
    return next((code for code in _WORST_FIRST if code in codes), max(codes, default=0))
