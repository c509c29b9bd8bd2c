"""A dataset given as a CSV table with one row per case."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

from ensemble.batch.layouts import FoundCase, missing_image_error
from ensemble.errors import InputRefused
from ensemble.readers.imagefile import case_name
from ensemble.tables import EMPTY_CELLS, quote_names, read_table
from ensemble.types import Modality

log = logging.getLogger(__name__)

_CASE = "case"
_DO = (
    "write the column names in the first line: 'case', 'dwi', 'adc', 'flair'; 'adc' may be missing only if the DWI also contains b0,"
    " with its b-values"
)


def read_worklist(path: Path, extra_columns: Sequence[str] = ()) -> tuple[FoundCase, ...]:
    """Read cases from a table with columns dwi, case, adc and flair; only dwi is required. Paths are relative to the table.

    A case without a name is named as `run` would name it. Cells of `extra_columns` are kept with their case
    (`FoundCase.extra`). Raises InputRefused for an invalid table.
    """
    columns, rows = _table(path, extra_columns)
    cases: dict[str, FoundCase] = {}
    for number, cells in rows:
        files: dict[Modality, Path] = {}
        problem = None
        for modality in Modality:
            if cells.get(modality):
                files[modality] = resolve_cell(path.parent, cells[modality])
                problem = problem or _foreign(path, cells[modality], files[modality])
        named = cells.get(_CASE) or (case_name(files[Modality.DWI]) if Modality.DWI in files else "")
        if not named and not files:
            continue
        if not named or named in cases:
            raise InputRefused(
                "the worklist names a case twice" if named else "a row of the worklist names no case",
                where=f"{path}, line {number}",
                found=named or ", ".join(cells.values()),
                do="give each row its own name in the column 'case'",
            )
        others = {column: cells[column] for column in extra_columns if cells.get(column)}
        cases[named] = FoundCase(named, files, problem or missing_image_error(files, path), extra=others)
    if Modality.ADC not in columns and all(case.problem for case in cases.values()):
        raise _lacks_columns(path, columns)
    return tuple(cases[name] for name in sorted(cases))


def _table(path: Path, extra_columns: Sequence[str]) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the table's rows by column name in lower case.

    And of each row the number of its line, and its cells by column, without what stands for nothing.
    """
    sheet = read_table(path, "the worklist")
    columns = _columns(sheet.headings, path, extra_columns)
    return columns, [(line, dict(zip(columns, map(_said, columns, cells), strict=False))) for line, cells in sheet.rows]


def _columns(cells: list[str], path: Path, extra_columns: Sequence[str]) -> list[str]:
    """Return the column names in lower case. Raises InputRefused if dwi is missing or a known column appears twice."""
    columns = [cell.lower() for cell in cells]
    if Modality.DWI not in columns:
        raise _lacks_columns(path, columns)
    ours = (_CASE, *Modality, *extra_columns)
    if twice := [name for name, often in Counter(columns).items() if often > 1 and name in ours]:
        raise InputRefused(
            "a column name appears twice in the worklist",
            where=path,
            found=quote_names(twice),
            do="remove or rename all but one",
        )
    if others := [cell for cell, name in zip(cells, columns, strict=False) if name and name not in ours]:
        log.info("note: these columns of the worklist are ignored: %s", ", ".join(others))
    return columns


def _said(column: str, cell: str) -> str:
    """Return the content of a cell; empty if it is a missing-value marker."""
    return "" if cell.lower() in (("n/a", "#n/a") if column == _CASE else EMPTY_CELLS) else cell


def resolve_cell(base: Path, cell: str) -> Path:
    """Return the path that a cell names. A relative one starts from `base`, the worklist's folder; Windows separators are accepted."""
    path = base / cell
    if "\\" in cell and not path.exists():
        return base / PureWindowsPath(cell).as_posix()
    return path


def _foreign(worklist: Path, cell: str, path: Path) -> InputRefused | None:
    """Return the error for a path on a Windows drive or share, which this machine can't resolve."""
    if not PureWindowsPath(cell).drive or path.exists():
        return None
    return InputRefused(
        "a path in the worklist is on a Windows drive or share that this machine can't access",
        where=worklist,
        found=cell,
        do="give paths relative to the worklist, or absolute paths on this machine (or in this container)",
    )


def _lacks_columns(path: Path, columns: Sequence[str]) -> InputRefused:
    found = f"columns: {quote_names(columns)}" if columns else "the file is empty"
    return InputRefused("the worklist lacks columns", where=path, found=found, do=_DO)
