"""Write files that are complete or not there at all: training and measuring may be stopped at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Yield a hidden name beside `path`, with its suffix, to write to; after the block the file has the name `path`."""
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield draft
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)
