"""The table of file formats: one row here, and one module of this folder with `write(payload, path)`.

Modules are imported only for writing, so that names are available without any image library.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class OutputFormat:
    """A file format of outputs."""

    module: str
    """Of this folder."""
    suffix: str = ""
    """Ending of the file's name; empty if the layout chooses it."""

    def write(self, payload: Any, path: Path) -> None:
        """Write a payload to a file in an existing folder. Raises OSError if the file is incomplete."""
        import_module(f"{__name__}.{self.module}").write(payload, path)


FORMATS = {
    "image": OutputFormat("image"),
    "json": OutputFormat("plain", ".json"),
    "html": OutputFormat("plain", ".html"),
    "png": OutputFormat("plain", ".png"),
    "dicom": OutputFormat("dicom", ".dcm"),
}
