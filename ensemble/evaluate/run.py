"""`evaluate PREDICTIONS GROUND_TRUTH --out metrics.csv`."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ensemble.errors import InputRefused, UsageError
from ensemble.evaluate.pairs import find_pairs
from ensemble.evaluate.plots import draw_plots
from ensemble.evaluate.scores import Score, score
from ensemble.evaluate.statistics import Summary, summarise
from ensemble.logging_setup import write_final_error_line
from ensemble.publish import publish
from ensemble.text import spreadsheet_cell

log = logging.getLogger(__name__)

_PER_CASE = tuple(name for name in Score.__dataclass_fields__ if name not in ("lesions_ml", "lesions_found"))


def evaluate(predictions: Path, truths: Path, out: Path) -> int:
    """Measure every case with a true mask. Returns how many could not be measured.

    Writes `<out>` (a row a case), `<out>_summary.csv` and `<out>_plots.png` beside it, the ending of `out` apart; all or none. Raises
    InputRefused when there is nothing to measure, UsageError when something else would be replaced.
    """
    _refuse_foreign(out)
    pairs, without_truth = find_pairs(predictions, truths)
    scores: list[Score] = []
    refused: list[tuple[str, InputRefused]] = []
    for pair in pairs:
        try:
            scores.append(score(pair))
        except InputRefused as error:
            refused.append((pair.case, error))
    if not scores:
        raise refused[0][1]
    with publish(out.parent) as staging:
        summaries = write_scores(scores, refused, staging / out.name)
    _tell(scores, summaries, refused, without_truth, out)
    return len(refused)


def write_scores(scores: Sequence[Score], refused: Sequence[tuple[str, InputRefused]], out: Path) -> list[Summary]:
    """Write the table of all cases, and beside it summary and plots. Returns the summary."""
    summaries = summarise(scores)
    measured = [asdict(one) | {"status": "measured"} for one in scores]
    failed = [{"case": case, "status": " ".join(str(error).split())} for case, error in refused]
    _write_csv(out, (*_PER_CASE, "status"), sorted(measured + failed, key=lambda row: str(row["case"])))
    _write_csv(out.with_name(f"{out.stem}_summary.csv"), tuple(Summary.__dataclass_fields__), map(asdict, summaries))
    draw_plots(scores, out.with_name(f"{out.stem}_plots.png"))
    return summaries


def _refuse_foreign(out: Path) -> None:
    """Raise UsageError where a file stands that no earlier evaluation has written: a mask, a worklist, the summary of a batch."""
    ours = {out: (*_PER_CASE, "status"), out.with_name(f"{out.stem}_summary.csv"): tuple(Summary.__dataclass_fields__)}
    for path, columns in ours.items():
        if path.is_file() and path.stat().st_size and _first_line(path) != ",".join(columns):
            raise UsageError(
                "a file that is no result of evaluate would be replaced", where=path, do="name another file as --out"
            )


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline(10_000).decode(errors="replace").rstrip()


def _tell(
    scores: Sequence[Score],
    summaries: Sequence[Summary],
    refused: Sequence[tuple[str, InputRefused]],
    without_truth: Sequence[str],
    out: Path,
) -> None:
    for case, error in refused:
        log.error("%s is not measured: %s", case, error)
    if refused:
        write_final_error_line(
            f"error: {len(refused)} of {len(scores) + len(refused)} cases are not measured: {out} says why"
        )
    if without_truth:
        log.info("no true mask, passed over: %s", ", ".join(without_truth))
    log.info("%d of %d cases measured", len(scores), len(scores) + len(refused))
    row = "  %-22s %-10s %4s  %s"
    log.info(row, "group", "measure", "n", "mean [95 % CI]              median (IQR)")
    for one in summaries:
        mean = f"{one.mean:.3f} [{one.mean_ci_low:.3f}, {one.mean_ci_high:.3f}]"
        log.info(row, one.group, one.measure, one.n, f"{mean:<27} {one.median:.3f} ({one.q1:.3f}-{one.q3:.3f})")
    log.info("written: %s", ", ".join((str(out), f"{out.stem}_summary.csv", f"{out.stem}_plots.png")))


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(
            {key: f"{v:.6g}" if isinstance(v, float) else spreadsheet_cell(v) for key, v in row.items()} for row in rows
        )
