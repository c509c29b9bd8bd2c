"""Write bytes and text as they are, everything else as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ensemble.publish import write_json
from ensemble.text import replace_undecodable


def write(payload: Any, path: Path) -> None:
    """Write bytes, text (UTF-8), or JSON data."""
    if isinstance(payload, bytes):
        path.write_bytes(payload)
    elif isinstance(payload, str):
        path.write_text(replace_undecodable(payload), encoding="utf-8")
    else:
        write_json(payload, path)
