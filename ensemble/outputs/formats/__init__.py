"""How a payload becomes a file: a row here, and a module of this folder with `write(payload, path)`.

Modules are imported when something is written: who only asks for names needs no image library.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    module: str
    """Of this folder."""
    suffix: str = ""
    """Ending of the file's name; empty where the layout chooses it."""

    def write(self, payload: Any, path: Path) -> None:
        """Write a payload to a file whose folder exists. Raises OSError when the file doesn't hold it in the end."""
        import_module(f"{__name__}.{self.module}").write(payload, path)


FORMATS = {
    "image": Format("image"),
    "json": Format("plain", ".json"),
    "html": Format("plain", ".html"),
    "png": Format("plain", ".png"),
    "dicom": Format("dicom", ".dcm"),
}
