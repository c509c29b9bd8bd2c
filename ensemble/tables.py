"""Read tables as spreadsheets save them: UTF-8 or UTF-16, separated by commas, semicolons or tabs."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import InputRefused
from ensemble.files import open_file

#: What people write into a cell that stands for nothing, in lower case; the first is BIDS' word.
EMPTY_CELLS = ("n/a", "#n/a", "na", "nan", "none", "null", "-", "--")


@dataclass(frozen=True)
class Table:
    """The non-empty lines of a table, headings first; cells are stripped."""

    delimiter: str
    headings: list[str]
    """As they are written. Empty headings at the end are dropped."""
    rows: list[tuple[int, list[str]]]
    """Line number and cells of each row; at most as many cells as headings."""


def quote_names(columns: Iterable[str]) -> str:
    """Return column names in quotes, for messages."""
    return ", ".join(f"'{name}'" for name in columns)


def read_table(path: Path, name: str) -> Table:
    """Read a table; `name` is its name in messages ("the worklist").

    Raises InputRefused for what is no text, has unfinished quotes, or more cells in a row than columns; OSError.
    """
    text = _text(path, name)
    delimiter = _delimiter(text)
    headings: list[str] = []
    rows: list[tuple[int, list[str]]] = []
    for line, cells in _rows(text, delimiter, path, name):
        if not headings:
            headings = cells
            while headings and not headings[-1]:
                headings.pop()
        elif any(cells[len(headings) :]):
            raise InputRefused(
                f"a row of {name} has more cells than the table has columns",
                where=f"{path}, line {line}",
                found=" | ".join(cells),
                do='put cells that contain the separator into quotes: "a,b.nii.gz"',
            )
        else:
            rows.append((line, cells[: len(headings)]))
    return Table(delimiter, headings, rows)


def _rows(text: str, delimiter: str, path: Path, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the non-empty lines, without a first line such as `sep=;`."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    first = True
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells) and not (first and _is_separator_line(cells)):
                first = False
                yield reader.line_num, cells
    except csv.Error as error:
        raise _no_table(path, name, f"line {reader.line_num}: {error}") from error


def _text(path: Path, name: str) -> str:
    """Decode UTF-8, or UTF-16 with its mark."""
    with open_file(path) as file:
        content = file.read()
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise _no_table(path, name, str(error)) from error


def _delimiter(text: str) -> str:
    """Return the delimiter: from a first line `sep=;`, else the most frequent one in the first line with text."""
    lines = [line for line in text.splitlines() if line.strip(" ,;\t\"'")]
    first = lines[0].strip().strip('"') if lines else ""
    if first.lower().startswith("sep=") and (told := lines[0].strip(" ").strip('"')[4:5]) in tuple(",;\t|"):
        return told
    return max(",;\t", key=(lines[0] if lines else "").count)


def _is_separator_line(cells: list[str]) -> bool:
    return cells[0].lower().startswith("sep=") and not any(cells[1:])


def _no_table(path: Path, name: str, found: str) -> InputRefused:
    return InputRefused(f"{name} is not a text table", where=path, found=found, do="save it as CSV in UTF-8")
