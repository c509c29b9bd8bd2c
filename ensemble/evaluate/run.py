"""`evaluate PREDICTIONS [PREDICTIONS ...] GROUND_TRUTH --out metrics.csv`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ensemble.errors import InputRefused, UsageError
from ensemble.evaluate.blinded import (
    ReaderStudy,
    ReaderStudyRequest,
    make_reader_study,
    mask_sources,
    read_blinded_cases,
    refuse_existing_study,
    write_reader_study,
)
from ensemble.evaluate.methods import Method, measure_methods
from ensemble.evaluate.output_files import METHOD, refuse_overwriting_other_files, sibling_path, write_csv
from ensemble.evaluate.plots import draw_plots
from ensemble.evaluate.scores import Score
from ensemble.evaluate.statistics import MeasureSummary, summarise
from ensemble.evaluate.study import (
    DATA,
    PAGE,
    TABLES,
    StudyRequest,
    StudyResults,
    make_study,
    read_and_check_request,
    write_study,
)
from ensemble.logging_setup import write_final_error_line
from ensemble.publish import publish

log = logging.getLogger(__name__)

_PER_CASE = tuple(name for name in Score.__dataclass_fields__ if name not in ("lesions_ml", "lesions_found"))
_SUMMARY = tuple(MeasureSummary.__dataclass_fields__)


def evaluate(predictions: Sequence[Path], truths: Path, out: Path, request: StudyRequest = StudyRequest()) -> int:  # noqa: B008 (frozen)
    """Measure every case with a true mask, for each method. Returns how many cases could not be measured.

    Writes `<out>` (one row per case), `<out>_summary.csv` and `<out>_plots.png` (without the ending of `out`). With several methods, or on
    request, also writes the files of `write_study`. Either all files appear or none. Raises InputRefused if there is nothing to measure,
    UsageError if other files would be replaced.
    """
    earlier = _earlier(out, request)
    clinical = read_and_check_request(request)
    if request.readers is not None:
        refuse_existing_study(request.readers.page, request.readers.key)
    methods = measure_methods(predictions, truths)
    readers = None if request.readers is None else _reader_study(methods, truths, request.readers)
    summaries = [summarise(list(method.scores.values())) for method in methods]
    study = make_study(methods, summaries, truths, request, clinical) if len(methods) > 1 or request.anything else None
    with publish(out.parent, earlier) as staging:
        tables = [(method.name, list(method.scores.values()), _refused(method)) for method in methods]
        _write_tables(tables, summaries, staging / out.name)
        names = write_study(study, staging / out.name) if study else []
        if readers and request.readers:
            write_reader_study(readers, request.readers.page, request.readers.key)
            names += [str(request.readers.page), f"{request.readers.key} (keep it from the readers)"]
    _tell(methods, summaries, study, [str(out), f"{out.stem}_summary.csv", f"{out.stem}_plots.png", *names])
    return sum(len(_refused(method)) for method in methods)


def _reader_study(methods: Sequence[Method], truths: Path, request: ReaderStudyRequest) -> ReaderStudy:
    names = mask_sources(methods)
    cases, said = read_blinded_cases(methods, truths, request.images)
    for line in said:
        log.warning("%s", line)
    log.info("reader study: %d cases, %s and %s", len(cases), *names)
    return make_reader_study(cases, names)


def write_scores(
    scores: Sequence[Score], refused: Sequence[tuple[str, InputRefused]], out: Path
) -> list[MeasureSummary]:
    """Write the table of all cases of one method, and beside it the summary and plots. Returns the summary."""
    summaries = summarise(scores)
    _write_tables([("", scores, refused)], [summaries], out)
    return summaries


def _write_tables(
    methods: Sequence[tuple[str, Sequence[Score], Sequence[tuple[str, InputRefused]]]],
    summaries: Sequence[Sequence[MeasureSummary]],
    out: Path,
) -> None:
    """Write the tables (with a column `method` if there are several) and the plots."""
    rows: list[dict[str, Any]] = []
    for name, scores, refused in methods:
        measured = [asdict(one) | {"status": "measured"} for one in scores]
        failed = [{"case": case, "status": " ".join(str(error).split())} for case, error in refused]
        rows += [{METHOD: name} | row for row in sorted(measured + failed, key=lambda row: str(row["case"]))]
    column = (METHOD,) * (len(methods) > 1)
    write_csv(out, (*column, *_PER_CASE, "status"), rows)
    write_csv(
        sibling_path(out, "summary.csv"),
        (*column, *_SUMMARY),
        ({METHOD: name} | asdict(row) for (name, _, _), own in zip(methods, summaries, strict=True) for row in own),
    )
    draw_plots({name: scores for name, scores, _ in methods}, sibling_path(out, "plots.png"))


def _refused(method: Method) -> list[tuple[str, InputRefused]]:
    """Return the cases that were not measured, and why; several true masks of one case count once."""
    by_pair = {id(error): (method.pairs[path].case, error) for path, error in method.refused.items()}
    return list(by_pair.values())


def _earlier(out: Path, request: StudyRequest) -> list[str]:
    """Raise UsageError if a file exists that is not from an earlier evaluation: a mask, a worklist, the summary of a batch.

    Returns the names of what an earlier one has written beside its table.
    """
    ours = {out: (*_PER_CASE, "status"), sibling_path(out, "summary.csv"): _SUMMARY}
    ours |= {sibling_path(out, f"{name}.csv"): columns for name, columns in TABLES.items()}
    written = [
        path.resolve()
        for path in (*ours, sibling_path(out, "plots.png"), sibling_path(out, DATA), sibling_path(out, PAGE))
    ]
    others = [request.clinical, *((request.readers.page, request.readers.key) if request.readers else ())]
    if both := [path for path in others if path and path.resolve() in written]:
        raise UsageError("two outputs have the same path", where=both[0], do="name another file as --out")
    refuse_overwriting_other_files(ours, sibling_path(out, DATA), sibling_path(out, PAGE))
    return [sibling_path(out, name).name for name in (*(f"{name}.csv" for name in TABLES), DATA, PAGE)]


def _tell(
    methods: Sequence[Method],
    summaries: Sequence[Sequence[MeasureSummary]],
    study: StudyResults | None,
    written: Iterable[str],
) -> None:
    several = len(methods) > 1
    failed = {method.name: _refused(method) for method in methods}
    for method in methods:
        for case, error in failed[method.name]:
            log.error("%s was not measured: %s", f"{method.name}: {case}" if several else case, error)
    measured = {method.name: len(method.scores) for method in methods}
    if refused := sum(map(len, failed.values())):
        write_final_error_line(
            f"error: {refused} of {refused + sum(measured.values())} cases were not measured: see {next(iter(written))}"
        )
    for method, own in zip(methods, summaries, strict=True):
        if several:
            log.info("%s", method.name)
        if method.without_truth:
            log.info("skipped, because they have no true mask: %s", ", ".join(method.without_truth))
        count = measured[method.name]
        log.info("%d of %d cases measured", count, count + len(failed[method.name]))
        _tell_summary(own)
    if study is not None:
        _tell_study(study)
    log.info("written: %s", ", ".join(written))


def _tell_summary(summaries: Sequence[MeasureSummary]) -> None:
    row = "  %-22s %-10s %4s  %s"
    log.info(row, "group", "measure", "n", "mean [95 % CI]              median (IQR)")
    for one in summaries:
        mean = f"{one.mean:.3f} [{one.mean_ci_low:.3f}, {one.mean_ci_high:.3f}]"
        log.info(row, one.group, one.measure, one.n, f"{mean:<27} {one.median:.3f} ({one.q1:.3f}-{one.q3:.3f})")


def _tell_study(study: StudyResults) -> None:
    for note in study.notes:
        log.info("note: %s", note)
    for row in study.ranking.rows if study.ranking else ():
        log.info("  place %g: %s, mean rank %.2f over %d cases", row.place, row.method, row.mean_rank, row.n)
