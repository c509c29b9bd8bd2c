"""The files that `evaluate` writes and may overwrite."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ensemble.errors import UsageError
from ensemble.files import read_json
from ensemble.outputs.report.run_report import TOOL
from ensemble.text import spreadsheet_cell

#: The first column of tables of several methods.
METHOD = "method"


def sibling_path(out: Path, ending: str) -> Path:
    """Return the path of a further output file of an evaluation: for metrics.csv, metrics_study.html."""
    return out.with_name(f"{out.stem}_{ending}")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table as CSV for spreadsheets."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(
            {key: f"{v:.6g}" if isinstance(v, float) else spreadsheet_cell(v) for key, v in row.items()} for row in rows
        )


def refuse_overwriting_other_files(tables: Mapping[Path, Sequence[str]], data: Path, page: Path) -> None:
    """Raise UsageError if a file would be replaced that no earlier evaluation wrote: a mask, a worklist, a batch summary.

    `tables` maps CSV files to their column names: an existing one must be empty, or have these names as its first line. `data` is the JSON
    file of results: an existing one must be by this tool. `page` is the HTML page written together with `data`: it may exist only if
    `data` does.
    """
    for path, columns in tables.items():
        known = [",".join(columns), ",".join((METHOD, *columns))]
        if path.is_file() and path.stat().st_size and _first_line(path) not in known:
            _refuse(path)
    if data.exists() and not _is_ours(data):
        _refuse(data)
    if page.exists() and not data.exists():
        _refuse(page)


def _refuse(path: Path) -> None:
    raise UsageError(
        "evaluate would overwrite a file that it did not write", where=path, do="choose another path for --out"
    )


def _is_ours(data: Path) -> bool:
    try:
        found = read_json(data)
        return bool(found["tool"]["name"] == TOOL and "methods" in found)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline(10_000).decode(errors="replace").rstrip()
