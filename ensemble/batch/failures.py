"""The last failure of each case, as a small file in `failed/` of the output folder.

Shares of a dataset that ran elsewhere, at another time, tell the summary of the whole by them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ensemble.files import read_json
from ensemble.folders import unwritable_error
from ensemble.outputs.layouts.bids import FAILED
from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.publish import write_text_atomically
from ensemble.text import replace_undecodable_in_json

_ATTEMPTS = 5


def record_failure(root: Path, scratch: Path, entities: BidsEntities, case: str, failure: Mapping[str, Any]) -> None:
    """Record that a case failed: its `message` and `exit_code`. Raises OSError."""
    path, content = _path(root, entities), json.dumps(replace_undecodable_in_json({"case": case, **failure}), indent=2)
    for left in reversed(range(_ATTEMPTS)):
        path.parent.mkdir(exist_ok=True)
        try:
            return write_text_atomically(path, content + "\n", scratch)
        except FileNotFoundError:  # in between another process has taken the empty folder away
            if not left:
                raise


def remove_failure(root: Path, entities: BidsEntities) -> None:
    """Remove the record of a case's failure. Raises UsageError."""
    path = _path(root, entities)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable_error(root, error) from error
    with suppress(OSError):
        path.parent.rmdir()


def read_failures(root: Path, places: Iterable[tuple[str, BidsEntities]]) -> dict[str, dict[str, Any]]:
    """Return the recorded failures of these cases by name: `message` and `exit_code`."""
    found, there = {}, set()
    with suppress(OSError):
        there = {path.name for path in (root / FAILED).iterdir()}  # one listing of the folder, not one per case
    for name, entities in places:
        path = _path(root, entities)
        if path.name not in there:
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):
            noted = read_json(path)
            found[name] = {"message": str(noted["message"]), "exit_code": int(noted["exit_code"])}
    return found


def _path(root: Path, entities: BidsEntities) -> Path:
    return root / FAILED / f"{entities.prefix}.json"
