"""A dataset given as a table: one row a case."""

from __future__ import annotations

import codecs
import csv
import io
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

from ensemble.batch.layouts import FoundCase, missing
from ensemble.errors import InputRefused
from ensemble.readers.imagefile import case_name
from ensemble.types import Modality

log = logging.getLogger(__name__)

_CASE = "case"
#: What people write into a cell that stands for nothing, in lower case; the first is BIDS' word.
_NONE = ("n/a", "#n/a", "na", "nan", "none", "null", "-", "--")
_DO = (
    "name the columns case, dwi, adc, flair in the first line; only a DWI that holds b0 as well, with its b-values,"
    " needs no adc"
)


def read_worklist(path: Path, also: Sequence[str] = ()) -> tuple[FoundCase, ...]:
    """Cases of a table with the columns dwi, case, adc and flair (all but dwi may be missing or empty); paths are relative to it.

    Without a name a case is called as `run` would call it. Cells of the columns that `also` names go with their case. Raises InputRefused
    for what is no such table.
    """
    columns, rows = _table(path, also)
    cases: dict[str, FoundCase] = {}
    for number, cells in rows:
        files: dict[Modality, Path] = {}
        problem = None
        for modality in Modality:
            if cells.get(modality):
                files[modality] = resolved(path.parent, cells[modality])
                problem = problem or _foreign(path, cells[modality], files[modality])
        named = cells.get(_CASE) or (case_name(files[Modality.DWI]) if Modality.DWI in files else "")
        if not named and not files:
            continue
        if not named or named in cases:
            raise InputRefused(
                "the worklist names a case twice" if named else "a row of the worklist names no case",
                where=f"{path}, line {number}",
                found=named or ", ".join(cells.values()),
                do="give each row its own name in the column case",
            )
        others = {column: cells[column] for column in also if cells.get(column)}
        cases[named] = FoundCase(named, files, problem or missing(files, path), also=others)
    if Modality.ADC not in columns and all(case.problem for case in cases.values()):
        raise _lacks_columns(path, columns)
    return tuple(cases[name] for name in sorted(cases))


def _table(path: Path, also: Sequence[str]) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the columns in lower case.

    And of each row the number of its line, and its cells by column, without what stands for nothing.
    """
    text = _text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    columns: list[str] = []
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells) or (not columns and _is_separator_line(cells)):
                continue
            if not columns:
                columns = _columns(cells, path, also)
                continue
            if any(cells[len(columns) :]):
                raise InputRefused(
                    "a row of the worklist has more cells than there are columns",
                    where=f"{path}, line {reader.line_num}",
                    found=" | ".join(cells),
                    do='put a cell that holds the separator into quotes: "a,b.nii.gz"',
                )
            rows.append((reader.line_num, dict(zip(columns, map(_said, columns, cells), strict=False))))
    except csv.Error as error:
        raise _no_table(path, f"line {reader.line_num}: {error}") from error
    if not columns:
        raise _lacks_columns(path, columns)
    return columns, rows


def _text(path: Path) -> str:
    """Decode UTF-8, or UTF-16 with its mark, as spreadsheets save it."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _no_table(path, str(error)) from error
    return text


def _delimiter(text: str) -> str:
    """Return as a first line `sep=;` says, which spreadsheets write and read; else what the first line with words holds most of."""
    lines = [line for line in text.splitlines() if line.strip(" ,;\t\"'")]
    first = lines[0].strip().strip('"') if lines else ""
    if first.lower().startswith("sep=") and (told := lines[0].strip(" ").strip('"')[4:5]) in tuple(",;\t|"):
        return told
    return max(",;\t", key=(lines[0] if lines else "").count)


def _is_separator_line(cells: list[str]) -> bool:
    return cells[0].lower().startswith("sep=") and not any(cells[1:])


def _columns(cells: list[str], path: Path, also: Sequence[str]) -> list[str]:
    """Return the names of the columns in lower case. Raises InputRefused where dwi is not among them, or one of ours is there twice."""
    columns = [cell.lower() for cell in cells]
    while columns and not columns[-1]:
        columns.pop()
    if Modality.DWI not in columns:
        raise _lacks_columns(path, columns)
    ours = (_CASE, *Modality, *also)
    if twice := [name for name, often in Counter(columns).items() if often > 1 and name in ours]:
        raise InputRefused(
            "a column name appears twice in the worklist", where=path, found=", ".join(twice), do="leave one of them"
        )
    if others := [cell for cell, name in zip(cells, columns, strict=False) if name and name not in ours]:
        log.info("note: columns of the worklist that are not read: %s", ", ".join(others))
    return columns


def _said(column: str, cell: str) -> str:
    """Return a cell's content; nothing where it says that there is none."""
    return "" if cell.lower() in (("n/a", "#n/a") if column == _CASE else _NONE) else cell


def resolved(base: Path, cell: str) -> Path:
    """Return the path that a cell means, relative to the worklist, in the words of this machine or of Windows."""
    path = base / cell
    if "\\" in cell and not path.exists():
        return base / PureWindowsPath(cell).as_posix()
    return path


def _foreign(worklist: Path, cell: str, path: Path) -> InputRefused | None:
    """Return what to say of a path on a drive or share of Windows, which this machine doesn't know."""
    if not PureWindowsPath(cell).drive or path.exists():
        return None
    return InputRefused(
        "a path of the worklist lies on a drive or share of Windows, which this machine does not know",
        where=worklist,
        found=cell,
        do="give paths relative to the worklist, or as this machine (or container) calls them",
    )


def _no_table(path: Path, found: str) -> InputRefused:
    return InputRefused("the worklist is no table of text", where=path, found=found, do="save it as CSV, UTF-8")


def _lacks_columns(path: Path, columns: Sequence[str]) -> InputRefused:
    return InputRefused("the worklist lacks columns", where=path, found=", ".join(columns) or "no row", do=_DO)
