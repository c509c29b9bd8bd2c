"""What the last attempt at a case came to, where it failed: a small file in `failed/` of the output folder.

Shares of a dataset that ran elsewhere, at another time, tell the summary of the whole by them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ensemble.batch.case_loop import Outcome
from ensemble.outputs.layouts.bids import FAILED
from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.publish import replace_text
from ensemble.text import all_printable


def record(root: Path, scratch: Path, place: BidsEntities, outcome: Outcome) -> None:
    """Note a failure, or take back what was noted before the case succeeded. Raises OSError."""
    path = _path(root, place)
    if outcome.status != "failed":
        with suppress(FileNotFoundError):
            path.unlink()
        with suppress(OSError):
            path.parent.rmdir()
        return
    path.parent.mkdir(exist_ok=True)
    content = all_printable({"case": outcome.case, "exit_code": outcome.exit_code, "message": outcome.message})
    replace_text(path, json.dumps(content, indent=2) + "\n", scratch)


def recorded(root: Path, places: Iterable[tuple[str, BidsEntities]]) -> dict[str, Outcome]:
    """Return the failures that are noted of these cases, by their names."""
    found = {}
    for name, place in places:
        with suppress(OSError, ValueError, KeyError, TypeError):
            noted = json.loads(_path(root, place).read_text(encoding="utf-8"))
            found[name] = Outcome(name, "failed", str(noted["message"]), int(noted["exit_code"]))
    return found


def _path(root: Path, place: BidsEntities) -> Path:
    return root / FAILED / f"{place.prefix}.json"
