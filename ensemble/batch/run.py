"""`batch DATASET OUT` and the levels of a BIDS App: segment all or some cases of a dataset into a tree of BIDS derivatives."""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ensemble.batch import failures
from ensemble.batch.case_list import read_case_list, search_again_advice
from ensemble.batch.case_loop import BatchPlan, CaseOutcome, segment_cases
from ensemble.batch.claims import BatchClaims
from ensemble.batch.find import find_cases
from ensemble.batch.identity import describe_recipe, result_key
from ensemble.batch.layouts import FoundImage
from ensemble.batch.on_ray import INSTALL, LOCAL, gpu_count, is_ray_installed, segment_on_ray
from ensemble.batch.parquet import FILE as PARQUET
from ensemble.batch.parquet import require_pyarrow
from ensemble.batch.parquet import to_parquet as as_parquet
from ensemble.batch.progress import BatchProgress, open_progress
from ensemble.batch.selection import CaseSelection, Placed
from ensemble.batch.summary import BatchSummary, collect_summary, write_summary
from ensemble.config import Device, ExtraOutputs, RunConfig
from ensemble.folders import unwritable_error
from ensemble.inference.device import resolve_device
from ensemble.logging_setup import write_final_error_line
from ensemble.members.manifest import find_members, weight_digests
from ensemble.outputs.layouts.bids import FAILED, refuse_unsafe_output_folder, write_dataset_description
from ensemble.outputs.layouts.bids_entities import BidsEntities, assign_entities
from ensemble.pipeline import load_from_config
from ensemble.program import command_line
from ensemble.publish import write_bytes_atomically

log = logging.getLogger(__name__)

#: Exit codes of failed cases, worst first: the batch ends with the worst that came up.
_WORST_FIRST = (1, 137, 4, 2, 5, 3)
#: What `group` ends with where cases have neither a result nor a failure on record.
_NOT_DONE = 3


@dataclass(frozen=True)
class BatchCases:
    """A dataset, and which of its cases this call processes."""

    path: Path
    selection: CaseSelection = field(default_factory=CaseSelection)
    wanted: Callable[[FoundImage], bool] = lambda image: True
    """Predicate: which of its images may be used."""
    case_list: Path | None = None
    """What an earlier search has found, to be read instead of searching again."""

    def find(self, out: Path) -> tuple[dict[str, BidsEntities], list[Placed]]:
        """Find all cases. Returns the entities of every case, and the selected cases. Raises InputRefused."""
        listed = self.case_list
        cases = find_cases(self.path, out, self.wanted) if listed is None else read_case_list(listed, self.path)
        places = assign_entities([case.name for case in cases])
        return places, self.selection.of(cases, places, self.path)


def segment_dataset(
    dataset: Path | BatchCases,
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
    """Segment the selected cases of `dataset` into case folders below `out`. Returns 0, or the worst exit code of a failed case.

    Set `summarise` to False if other calls process the rest of the dataset; `group` then writes the summary. `parquet` also writes it as
    Parquet. `ray` is the address of a Ray cluster, with `ray_cpus` per process; several GPUs of this machine use a local one. Raises
    InputRefused when there is no case, WeightsBroken, and UsageError when results can't be written or the device does not exist.
    """
    of = dataset if isinstance(dataset, BatchCases) else BatchCases(dataset)
    if parquet and summarise:
        require_pyarrow()
    refuse_unsafe_output_folder(out, of.path)
    places, selected = of.find(out)
    _tell_list(selected)
    specs = find_members(config.weights_folder, config.members)
    digests = {spec.name: weight_digests(spec) for spec in specs}
    ray = ray or _for_gpus(config.device)
    device = "cpu" if ray else resolve_device(config.device)
    plan = BatchPlan(out, config, extras, describe_recipe(specs, digests, config, extras), device, resume)
    outcomes: dict[str, CaseOutcome] = {}
    try:
        claims = BatchClaims(out, result_key(plan.recipe, {}))
        try:
            write_dataset_description(out, claims.folder, of.path)
            log.info("%d cases in %s", len(selected), of.path)
            try:
                with closing(open_progress(len(selected))) as shown:
                    tell = _Teller(outcomes, shown)
                    if ray:
                        segment_on_ray(ray, ray_cpus, plan, claims, selected, partial(load_from_config, config), tell)
                    else:
                        segment_cases(plan, claims, selected, lambda: load_from_config(config), shown, tell)
            finally:  # also what was interrupted has a summary
                if summarise:
                    _write_summaries(out, claims, collect_summary(out, places, outcomes), parquet=parquet)
        finally:
            claims.leave()
    except OSError as error:
        raise unwritable_error(out, error) from error
    _tell_end(out, len(selected), outcomes, summarised=summarise, parquet=parquet)
    if not summarise:
        log.info(
            "  the summary of all, once the others have ended: %s",
            command_line(f"{shlex.join([str(of.path), str(out)])} group"),
        )
    return _worst(outcomes)


def _for_gpus(device: Device) -> str | None:
    """Return the Ray address for sharing work among several GPUs of this machine; None if there are not several, or no Ray."""
    if (count := gpu_count(device)) < 2:
        return None
    if is_ray_installed():
        return LOCAL
    log.warning(
        "note: one of %d GPUs works. All do with Ray (%s), or with the same call once more for each:"
        " CUDA_VISIBLE_DEVICES=1 %s, and so on",
        count, INSTALL, command_line("batch ..."),
    )  # fmt: skip
    return None


def _tell_list(selected: Sequence[Placed]) -> None:
    """Log from when the cases are, if they come from a list."""
    if listed := {case.listed for case, _ in selected} - {""}:
        log.info(
            "note: the cases are those of %s. If any joined or were mended since, %s", *listed, search_again_advice()
        )


def write_group_summary(dataset: BatchCases, out: Path, *, parquet: bool = False) -> int:
    """Write `summary.csv` and `index.html` for all cases of `dataset`, from results that earlier calls left below `out`.

    `parquet` also writes `summary.parquet`. Returns the worst exit code of a failed case, 3 if cases are not done, or 0. Raises as `batch`
    does.
    """
    if parquet:
        require_pyarrow()
    refuse_unsafe_output_folder(out, dataset.path)
    places, selected = dataset.find(out)
    _tell_list(selected)
    recorded = failures.read_failures(out, places.items())
    failed = {name: CaseOutcome(name, "failed", **noted) for name, noted in recorded.items()}
    outcomes = {name: failed.get(name, CaseOutcome(name, "kept")) for name in places}
    try:
        claims = BatchClaims(out, "group")
        try:
            write_dataset_description(out, claims.folder, dataset.path)
            found = collect_summary(out, places, outcomes)
            _write_summaries(out, claims, found, parquet=parquet)
        finally:
            claims.leave()
    except OSError as error:
        raise unwritable_error(out, error) from error
    if found.recipes > 1:
        log.warning(
            "note: the results were made in %d ways (version, options or weights). participant makes anew what was not made as it is asked",
            found.recipes,
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
        undone = f"{len(waiting)} of {len(places)} cases are not done: see {out / 'summary.csv'}"
        write_final_error_line(f"error: {undone}") if not failed else log.info("%s", undone)
    return _worst(failed) or (_NOT_DONE if waiting else 0)


def _write_summaries(out: Path, claims: BatchClaims, found: BatchSummary, *, parquet: bool) -> None:
    """Write the summary in all requested formats. Raises OSError."""
    write_summary(out, claims.folder, found.rows)
    if parquet:
        write_bytes_atomically(out / PARQUET, as_parquet(found.rows), claims.folder)
    elif (out / PARQUET).exists():
        log.warning("note: %s is of an earlier call: --parquet writes it anew", out / PARQUET)


@dataclass(frozen=True)
class _Teller:
    """Keeps the first outcome of each case and passes it on: every process that shares the work reports one for every case."""

    outcomes: dict[str, CaseOutcome]
    shown: BatchProgress

    def __call__(self, outcome: CaseOutcome) -> None:
        if outcome.case not in self.outcomes:
            self.outcomes[outcome.case] = outcome
            self.shown.tell(outcome)


def _tell_end(out: Path, cases: int, outcomes: Mapping[str, CaseOutcome], *, summarised: bool, parquet: bool) -> None:
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
        write_final_error_line(f"error: {counts['failed']} of {cases} cases failed: see {says}")


def _worst(outcomes: Mapping[str, CaseOutcome]) -> int:
    codes = {outcome.exit_code for outcome in outcomes.values() if outcome.status == "failed"}
    return next((code for code in _WORST_FIRST if code in codes), max(codes, default=0))
