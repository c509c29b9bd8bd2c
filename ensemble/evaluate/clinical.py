"""A table of clinical scores, and how lesion volume and number correlate with them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ensemble.errors import InputRefused, UsageError
from ensemble.evaluate.intervals import (
    MIN_CORRELATED,
    holm_correction,
    interval_ends,
    spearman,
    spearman_intervals,
)
from ensemble.evaluate.methods import TRUTH, Method
from ensemble.evaluate.scores import Score
from ensemble.files import cannot_open_error
from ensemble.tables import EMPTY_CELLS, Table, quote_names, read_table
from ensemble.text import replace_undecodable
from ensemble.types import FloatArray

_NAME = "the clinical table"
_CASE = "case"
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d{1,3})?", re.ASCII)
#: Quantities that are related to clinical scores: their names, and how to compute them from predicted and true masks.
QUANTITIES = {"volume_ml": ("predicted_ml", "truth_ml"), "lesions": ("predicted_lesions", "truth_lesions")}


@dataclass(frozen=True)
class ClinicalTable:
    """A table of clinical scores and groups of patients, by case name."""

    cases: frozenset[str]
    scores: Mapping[str, Mapping[str, float]]
    """Columns of numbers: by case, without missing ones."""
    words: Mapping[str, Mapping[str, str]]
    """All columns as text, for groups: by case, without missing ones."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of a mask quantity (volume or number of lesions) with a clinical score."""

    masks: str
    """A method, or the true masks."""
    quantity: str
    score: str
    n: int
    rho: float | None
    ci_low: float | None
    """Bootstrap 95 % interval (percentile, 9999 resamples of the cases, fixed seed)."""
    ci_high: float | None
    p: float | None
    p_holm: float | None
    """Corrected for all rows."""
    note: str = ""


@dataclass(frozen=True)
class CorrelationDifference:
    """The difference between a method's correlation with a score and that of the true masks, on the same cases."""

    method: str
    quantity: str
    score: str
    n: int
    rho_predicted: float | None
    rho_true: float | None
    difference: float | None
    ci_low: float | None
    """Bootstrap 95 % interval, both drawn together."""
    ci_high: float | None
    note: str = ""


def read_clinical_table(path: Path, groups: Sequence[str]) -> ClinicalTable:
    """Read a table with a column `case`, clinical scores, and the columns named in `groups`.

    A column is a score if all its cells are numbers; columns of text are ignored, with a note. Raises InputRefused for
    an invalid table, a repeated case, or numbers and text in one column.
    """
    try:
        sheet = read_table(path, _NAME)
    except OSError as error:
        raise cannot_open_error(_NAME, path, error) from error
    columns = _columns(sheet, path)
    lower = {name.lower(): name for name in columns}
    key = columns.pop(lower[_CASE])
    lines = _by_case(sheet, key, path)
    words = {
        name: {case: cell for case, (_, cells) in lines.items() if (cell := _cell(cells, place))}
        for name, place in columns.items()
    }
    grouping = {lower[group.lower()] for group in groups if group.lower() in lower}
    numbers, notes = _Numbers(sheet, path, lines), []
    scores = {}
    for name, place in columns.items():
        if name not in grouping and words[name]:
            if (found := numbers.column(name, place)) is None:
                notes.append(f"column {name} of {_NAME} is text, so it is not used as a score")
            else:
                scores[name] = found
    notes += [f"column {name} of {_NAME} is empty" for name in columns if not words[name]]
    return ClinicalTable(frozenset(lines), scores, words, tuple(notes))


def check_case_names(clinical: ClinicalTable, names: Sequence[str], table: Path, masks: Path) -> list[str]:
    """Return messages about cases that are only in the clinical table, or only among the masks.

    Args:
        clinical: content of the table.
        names: of the cases that have masks.
        table, masks: where both are, for messages.

    Raises:
        InputRefused: no case is in both, two masks' cases have the same name, or names are similar but not equal (1 and 001, when a
            spreadsheet has read names as numbers).
    """
    if twice := [name for name, often in Counter(names).items() if often > 1]:
        raise InputRefused(
            f"two cases of the masks have the same name {twice[0]}, but {_NAME} identifies cases by name only",
            where=masks,
            found=", ".join(twice[:5]) + " ..." * (len(twice) > 5),
            do="give each case's masks a unique name",
        )
    without_row = [name for name in names if name not in clinical.cases]
    without_mask = sorted(clinical.cases - set(names))
    alike = {_lossy(case): case for case in without_mask}
    if similar := [(name, alike[_lossy(name)]) for name in without_row if _lossy(name) in alike]:
        raise InputRefused(
            f"case names in {_NAME} are similar to those of the masks, but not equal",
            where=table,
            found=", ".join(f"{theirs!r} for {ours!r}" for ours, theirs in similar[:5]) + " ..." * (len(similar) > 5),
            do="spell case names as the masks do; a spreadsheet turns 001 into 1 unless the column is text",
        )
    if len(without_row) == len(names):
        raise InputRefused(
            f"{_NAME} and the masks have no case in common",
            where=table,
            found=f"table: {', '.join(without_mask[:3])}; masks: {', '.join(sorted(names)[:3])}",
            do="write the names of the masks' cases into the column 'case'",
        )
    said = [f"no row in {_NAME}, so in no score or group of it: {', '.join(without_row)}"] * bool(without_row)
    return said + [f"in {_NAME} without a measured mask: {', '.join(without_mask)}"] * bool(without_mask)


def correlate_with_scores(
    methods: Sequence[Method], clinical: ClinicalTable
) -> tuple[list[Correlation], list[CorrelationDifference]]:
    """Correlate volume and number of lesions, of each method and of the true masks, with every score."""
    rows, differences = [], []
    truths: dict[Path, Score] = {case: one for method in reversed(methods) for case, one in method.scores.items()}
    for score, known in clinical.scores.items():
        for quantity, (predicted, true) in QUANTITIES.items():
            every = [one for one in truths.values() if one.case in known]
            rows.append(_correlation(TRUTH, quantity, score, _values(every, true), _known(every, known)))
            for method in methods:
                cases = [one for one in method.scores.values() if one.case in known]
                ours, theirs, wanted = _values(cases, predicted), _values(cases, true), _known(cases, known)
                row, difference = _with_difference(method.name, quantity, score, ours, theirs, wanted)
                rows.append(row)
                differences.append(difference)
    corrected = holm_correction([row.p for row in rows])
    return [replace(row, p_holm=p) for row, p in zip(rows, corrected, strict=True)], differences


def _values(cases: Sequence[Score], field: str) -> FloatArray:
    return np.array([getattr(case, field) for case in cases], float)


def _known(cases: Sequence[Score], known: Mapping[str, float]) -> FloatArray:
    return np.array([known[case.case] for case in cases], float)


def _correlation(masks: str, quantity: str, score: str, values: FloatArray, wanted: FloatArray) -> Correlation:
    found = spearman(values, wanted)
    interval = spearman_intervals(values, values, wanted)[0] if found else None
    note = _note(found, values, wanted, f"{quantity} of the {TRUTH}", score)
    return Correlation(
        masks, quantity, score, len(values), found and found[0], *interval_ends(interval), found and found[1], None, note
    )  # fmt: skip


def _with_difference(
    method: str, quantity: str, score: str, ours: FloatArray, theirs: FloatArray, wanted: FloatArray
) -> tuple[Correlation, CorrelationDifference]:
    """Correlate predicted quantities with a score, and compare with the true masks of the same cases."""
    one, other = spearman(ours, wanted), spearman(theirs, wanted)
    drawn = spearman_intervals(ours, theirs, wanted)
    interval = drawn[0] or (spearman_intervals(ours, ours, wanted)[0] if one else None)
    note = _note(one, ours, wanted, f"{quantity} of {method}", score)
    row = Correlation(
        method, quantity, score, len(ours), one and one[0], *interval_ends(interval), one and one[1], None, note
    )
    said = note if one is None else _note(other, theirs, wanted, f"{quantity} of the {TRUTH}", score)
    if one and other and np.array_equal(ours, theirs):
        said, drawn = "equal in all cases", (None, None, None)
    elif one and other and drawn[2] is None:
        said = f"an interval needs at least {MIN_CORRELATED} cases"
    rho, rho_true = one and one[0], other and other[0]
    return row, CorrelationDifference(
        method,
        quantity,
        score,
        len(ours),
        rho,
        rho_true,
        None if rho is None or rho_true is None else rho - rho_true,
        *interval_ends(drawn[2]),
        said,
    )


def _note(found: object, values: FloatArray, wanted: FloatArray, name: str, score: str) -> str:
    """Return why a value can't be computed."""
    if len(values) < 3:
        return "a correlation needs at least 3 cases"
    if found is None:
        return f"all values of {score if np.ptp(wanted) == 0 else name} are equal"
    return f"an interval needs at least {MIN_CORRELATED} cases" if len(values) < MIN_CORRELATED else ""


def _columns(sheet: Table, path: Path) -> dict[str, int]:
    """Return the index of each named column; unnamed ones are skipped. Raises InputRefused."""
    if _CASE not in (lower := [heading.lower() for heading in sheet.headings]):
        raise InputRefused(
            f"{_NAME} has no column {_CASE!r}",
            where=path,
            found=f"columns: {quote_names(sheet.headings)}" if sheet.headings else "the file is empty",
            do="write the column names in the first line: 'case', then any others ('nihss', 'mrs', 'scanner' ...)",
        )
    if twice := [name for name, often in Counter(lower).items() if often > 1 and name]:
        raise InputRefused(
            f"a column appears twice in {_NAME}",
            where=path,
            found=quote_names(twice),
            do="remove or rename all but one",
        )
    return {heading: place for place, heading in enumerate(sheet.headings) if heading}


def _by_case(sheet: Table, key: int, path: Path) -> dict[str, tuple[int, list[str]]]:
    lines: dict[str, tuple[int, list[str]]] = {}
    for line, cells in sheet.rows:
        case = unicodedata.normalize("NFC", replace_undecodable(cells[key] if key < len(cells) else ""))
        if not case or case in lines:
            raise InputRefused(
                f"{_NAME} names a case twice" if case else f"a row of {_NAME} names no case",
                where=f"{path}, line {line}",
                found=case or " | ".join(cells),
                do="give each case one row, with its name in the column 'case'",
            )
        lines[case] = line, cells
    if not lines:
        raise InputRefused(f"{_NAME} has no row below the column names", where=path, do="write one row for each case")
    return lines


def _cell(cells: Sequence[str], place: int) -> str:
    """Return the content of a cell; empty if it is a missing-value marker."""
    cell = cells[place] if place < len(cells) else ""
    return "" if cell.lower() in EMPTY_CELLS else cell


@dataclass
class _Numbers:
    """The numeric cells of a table, all with a point or all with a comma as decimal mark."""

    sheet: Table
    path: Path
    lines: Mapping[str, tuple[int, list[str]]]
    mark: str = ""
    """The decimal mark that was met first."""

    def column(self, name: str, place: int) -> dict[str, float] | None:
        """Return the numbers of a column by case; None if it holds only text. Raises InputRefused."""
        cells = {case: (line, cell) for case, (line, row) in self.lines.items() if (cell := _cell(row, place))}
        if not any(_NUMBER.fullmatch(cell) for _, cell in cells.values()):
            return None
        return {case: self._number(name, line, cell) for case, (line, cell) in cells.items()}

    def _number(self, name: str, line: int, cell: str) -> float:
        mark = next((one for one in ",." if one in cell), "")
        self.mark = self.mark or mark
        value = float(cell.replace(",", ".")) if _NUMBER.fullmatch(cell) else np.inf
        wrong = "is not a number" if not np.isfinite(value) else ""
        if not wrong and mark == "," and self.sheet.delimiter == ",":
            wrong = "has a decimal comma in a comma-separated table"
        elif not wrong and mark and mark != self.mark:
            wrong = "has a different decimal mark from the numbers before it"
        if wrong:
            raise InputRefused(
                f"a cell of the column {name!r} in {_NAME} {wrong}",
                where=f"{self.path}, line {line}",
                found=cell,
                do="write all numbers in the same way (3.5) and leave unknown values empty;"
                " if the column holds groups, name it in --by",
            )
        return value


def select_group_columns(
    clinical: ClinicalTable | None, names: Sequence[str], path: Path | None
) -> dict[str, Mapping[str, str]]:
    """Return the named columns of the table, each as a mapping from case to group. Raises UsageError if one does not exist."""
    lower = {} if clinical is None else {name.lower(): name for name in clinical.words}
    if absent := [name for name in names if name.lower() not in lower]:
        raise UsageError(
            f"--by names a column that {_NAME} does not have"
            if clinical
            else "--by names a column, but no table is given",
            where=path or "",
            found=f"{', '.join(absent)}" + (f"; columns: {', '.join(lower.values())}" if clinical else ""),
            do="give names of columns, separated by commas"
            if clinical
            else "add --clinical TABLE, or use only lesion_size and lesion_number",
        )
    assert clinical is not None or not names
    return {lower[name.lower()]: clinical.words[lower[name.lower()]] for name in names} if clinical else {}


def _lossy(name: str) -> str:
    letters = unicodedata.normalize("NFKD", name.casefold().removeprefix("sub-"))
    return re.sub(r"[\W_]|(?<!\d)0+(?=\d)", "", letters)
