"""The summary of a batch as Parquet: the columns of `summary.csv`, with their types. Needs pyarrow, which is an extra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_type_hints

from ensemble.batch.summary import SummaryRow
from ensemble.errors import UsageError
from ensemble.text import replace_undecodable

FILE = "summary.parquet"
INSTALL = "pip install pyarrow"
_LARGEST = 2**63


def require_pyarrow() -> None:
    """Raise UsageError where Parquet can't be written."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        do = f"run {INSTALL}, or leave out --parquet: summary.csv holds the same"
        raise UsageError("--parquet needs pyarrow, which can't be imported", found=str(error), do=do) from error


def to_parquet(rows: Sequence[SummaryRow]) -> bytes:
    """Return the rows as a Parquet file: text as string, counts as int64, measures as double; unknown values are null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.string(), int | None: pa.int64(), float | None: pa.float64()}
    schema = pa.schema([(name, types[hint]) for name, hint in get_type_hints(SummaryRow).items()])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([_cells(row) for row in rows], schema), sink)
    return bytes(sink.getvalue())


def _cells(row: SummaryRow) -> dict[str, Any]:
    """Return a row as its file holds it: reports of others may hold integers of any size."""
    cells: dict[str, Any] = {}
    for name, value in asdict(row).items():
        if isinstance(value, str):
            cells[name] = replace_undecodable(value) or None
        else:
            cells[name] = None if isinstance(value, int) and abs(value) >= _LARGEST else value
    return cells
