"""A dataset given as a table: one row a case."""

from __future__ import annotations

import csv
from pathlib import Path

from ensemble.batch.layouts import FoundCase, missing
from ensemble.errors import InputRefused
from ensemble.readers.names import stem
from ensemble.types import Modality


def read_worklist(path: Path) -> tuple[FoundCase, ...]:
    """Cases of a table with the columns dwi, case, adc and flair (which may be missing or empty); paths are relative to it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter, restval=""))
        columns = {name.strip().lower() for name in rows[0]} if rows else set()
    except (UnicodeDecodeError, csv.Error, AttributeError) as error:
        raise InputRefused(
            "the worklist is no table of text", where=path, found=str(error), do="save it as CSV, UTF-8"
        ) from error
    if "dwi" not in columns:
        raise _lacks_columns(path, columns)
    cases: dict[str, FoundCase] = {}
    for row in rows:
        cells = {
            (name or "").strip().lower(): (cell or "").strip() for name, cell in row.items() if isinstance(cell, str)
        }
        files = {modality: path.parent / cells[modality] for modality in Modality if cells.get(modality)}
        name = cells.get("case") or (stem(files[Modality.DWI]) if Modality.DWI in files else "")
        if not name and not files:
            continue
        if not name or name in cases:
            raise InputRefused(
                "the worklist names a case twice" if name else "a row of the worklist names no case",
                where=path,
                found=name or str(row),
                do="give each row its own name in the column case",
            )
        cases[name] = FoundCase(name, files, missing(files, path))
    if "adc" not in columns and all(case.problem for case in cases.values()):
        raise _lacks_columns(path, columns)
    return tuple(cases[name] for name in sorted(cases))


def _lacks_columns(path: Path, columns: set[str]) -> InputRefused:
    return InputRefused(
        "the worklist lacks columns",
        where=path,
        found=", ".join(sorted(columns)) or "no row",
        do="name the columns case, dwi, adc, flair in the first line; only a DWI that holds b0 as well, with its b-values, needs no adc",
    )
