"""Summary of a batch as `summary.csv` and `index.html`, from the results in the tree and the recorded failures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ensemble.batch.case_loop import CaseOutcome
from ensemble.outputs.layouts.bids import REPORT_FILE, mask_path, read_report
from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.publish import write_text_atomically
from ensemble.text import spreadsheet_cell

#: Status of cases that are no longer in the dataset, but whose results are in the output folder.
GONE = "not in the dataset"
#: Status of cases that the batch did not reach, with a complete earlier result; it was not checked whether the result is up to date.
EARLIER = "earlier result"

#: Whose volumes have a column each.
_PLACES = ("left", "right", "cerebrum", "cerebellum", "brain stem", "cortex", "white matter", "deep grey")

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class SummaryRow:
    """One row of `summary.csv`: the result of one case, or why there is none."""

    case: str
    subject: str
    session: str
    status: str
    """done, failed, not done (the batch ended before), earlier result (not done now), or not in the dataset (any more)."""
    volume_ml: float | None = None
    lesions: int | None = None
    agreement: float | None = None
    """Mean pairwise Dice of the voters' masks."""
    voters: str = ""
    repairs: str = ""
    seconds: float | None = None
    """Reading, preparing, networks and fusion."""
    mask: str = ""
    """Path relative to the output folder, like the next field."""
    page: str = ""
    message: str = ""
    """Why it failed."""
    findings: str = ""
    """off, ok, or why the brain could not be registered to the template."""
    pattern: str = ""
    """none, single or scattered."""
    largest_ml: float | None = None
    side: str = ""
    """left, right or both."""
    left_ml: float | None = None
    right_ml: float | None = None
    cerebrum_ml: float | None = None
    cerebellum_ml: float | None = None
    brain_stem_ml: float | None = None
    cortex_ml: float | None = None
    white_matter_ml: float | None = None
    deep_grey_ml: float | None = None
    leading: str = ""
    """For each of the user's label maps, the group (or label) with most of the lesion: `<map>=<group>`."""
    trust: str = ""
    """good, check or poor; unknown without references, off if not requested."""
    expected_dice: float | None = None
    expected_dice_low: float | None = None
    expected_dice_high: float | None = None
    trust_why: str = ""


@dataclass(frozen=True)
class BatchSummary:
    """The rows of `summary.csv`, made from the reports and failures of a batch."""

    rows: list[SummaryRow]
    recipes: int
    """How many different recipes (version, options, weights) made the results of the dataset."""


def collect_summary(
    root: Path, places: Mapping[str, BidsEntities], outcomes: Mapping[str, CaseOutcome]
) -> BatchSummary:
    """Return a row for each case of the dataset, and for each result below `root` whose case is no longer in it. Reads each report once."""
    table, recipes = [], set()
    for name, place in places.items():
        outcome, labels = outcomes.get(name), (name, place.subject, place.session)
        report = read_report(root, place)
        if (recipe := _said(report or {}, dict, "batch", "recipe")) is not None:
            recipes.add(json.dumps(recipe, sort_keys=True))
        if outcome is not None and outcome.status == "failed":
            table.append(SummaryRow(*labels, "failed", message=" ".join(outcome.message.split())))
        elif report is not None:
            table.append(_of_report(SummaryRow(*labels, "done" if outcome else EARLIER), report, place, root))
        else:
            table.append(SummaryRow(*labels, "not done"))
    for place in sorted(_standing(root) - set(places.values())):
        if (report := read_report(root, place)) is not None:
            name = _said(report, str, "case", "name") or place.prefix
            table.append(_of_report(SummaryRow(name, place.subject, place.session, GONE), report, place, root))
    return BatchSummary(table, len(recipes))


def write_summary(root: Path, scratch: Path, table: Sequence[SummaryRow]) -> None:
    """Write `summary.csv` and `index.html`. Raises OSError."""
    from ensemble.outputs.report.page import render_index_page

    text = io.StringIO()
    writer = csv.DictWriter(text, tuple(SummaryRow.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: spreadsheet_cell(value) for key, value in asdict(row).items()} for row in table)
    write_text_atomically(root / "summary.csv", text.getvalue(), scratch)
    write_text_atomically(root / "index.html", render_index_page([asdict(row) for row in table]), scratch)


def recorded_costs(root: Path, device: str) -> Iterator[tuple[float, list[int], list[float]]]:
    """Yield the run time (s), DWI size (voxels x, y, z) and DWI spacing (mm; x, y, z) of each earlier result made on a device."""
    for place in sorted(_standing(root)):
        report = read_report(root, place) or {}
        size = _said(report, list, "case", "grid", "size_xyz") or []
        spacing_mm = _said(report, list, "case", "grid", "spacing_mm_xyz") or []
        seconds = _seconds(report)
        numbers = [number for number in map(_number, (*size, *spacing_mm)) if number is not None and number > 0]
        if (
            seconds is not None
            and len(size) == len(spacing_mm) == 3
            and len(numbers) == 6
            and report.get("device") == device
        ):
            yield seconds, size, spacing_mm


def _of_report(row: SummaryRow, report: Mapping[str, Any], place: BidsEntities, root: Path) -> SummaryRow:
    """Return a row filled from a report; fields that the report lacks (it may be of another version) stay empty."""
    page = place.folder / "report.html"
    lesions = _said(report, int, "lesion", "count")
    return replace(
        row,
        volume_ml=_number(_said(report, object, "lesion", "volume_ml")),
        lesions=lesions,
        agreement=_number(_said(report, object, "agreement")),
        voters=" ".join(map(str, _said(report, list, "fusion", "voters") or ())),
        repairs="; ".join(map(str, _said(report, list, "repairs") or ())),
        seconds=_seconds(report),
        mask=mask_path(place),
        page=(page if (root / page).is_file() else place.folder / REPORT_FILE).as_posix(),
        **_findings(report),
        **_trust(report),
    )


def _trust(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns about trust."""
    told = _said(report, dict, "trust")
    if told is None:
        return {"trust": "off"}
    ends = [_number(end) for end in _said(told, list, "interval") or ()]
    low, high = ends if len(ends) == 2 else (None, None)
    return {
        "trust": _said(told, str, "verdict") or "unknown",
        "expected_dice": _number(_said(told, object, "expected_dice")),
        "expected_dice_low": low,
        "expected_dice_high": high,
        "trust_why": "; ".join(map(str, _said(told, list, "why") or ())),
    }


def _seconds(report: Mapping[str, Any]) -> float | None:
    """Return the time (s) of a case without loading networks; None if its report does not say."""
    stages = _said(report, dict, "seconds")
    if not stages:
        return None
    return round(sum(_number(value) or 0.0 for stage, value in stages.items() if stage != "load members"), 2)


def _findings(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns about the lesion's location."""
    found = _said(report, dict, "findings")
    if found is None:
        return {"findings": "off"}
    problems = _said(found, list, "registration", "problems") or ()
    amounts = {
        amount["name"]: _number(_said(amount, object, "ml", "value"))
        for kind in ("sides", "regions", "structures")
        for amount in _said(found, list, "places", kind) or ()
        if isinstance(amount, dict) and isinstance(amount.get("name"), str)
    }
    told = [
        (_said(atlas, str, "name"), _said(atlas, str, "leading", "value"))
        for atlas in _said(found, list, "atlases") or ()
        if isinstance(atlas, dict)
    ]
    columns = {
        "findings": "; ".join(map(str, problems)) or "ok",
        "pattern": _said(found, str, "pattern", "value") or "",
        "largest_ml": _number(_said(found, object, "largest_ml", "value")),
        "side": _said(found, str, "places", "side", "value") or "",
        "leading": "; ".join(f"{name}={group}" for name, group in told if group),
    }
    return columns | {f"{name.replace(' ', '_')}_ml": amounts.get(name) for name in _PLACES}


def _said(report: Mapping[str, Any], kind: type[Kind], *keys: str) -> Kind | None:
    """Return the value at nested keys of a report; None unless it has the given type."""
    found: Any = report
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, kind) and not isinstance(found, bool) else None


def _number(found: object) -> float | None:
    """Return a finite number; None for anything else."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        return float(found) if math.isfinite(found) else None
    except OverflowError:
        return None


def _standing(root: Path) -> set[BidsEntities]:
    """Return the entities of all results in the tree."""
    reports = [*root.glob(f"sub-*/{REPORT_FILE}"), *root.glob(f"sub-*/ses-*/{REPORT_FILE}")]
    labels = [[part.partition("-")[2] for part in report.parent.relative_to(root).parts] for report in reports]
    return {BidsEntities(*label) for label in labels}
