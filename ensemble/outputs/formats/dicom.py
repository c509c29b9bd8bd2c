"""Write DICOM objects as files (PS3.10)."""

from __future__ import annotations

from pathlib import Path

from pydicom.dataset import Dataset


def write(dataset: Dataset, path: Path) -> None:
    """Write an object with its file meta information. Raises OSError."""
    dataset.save_as(path, enforce_file_format=True)
