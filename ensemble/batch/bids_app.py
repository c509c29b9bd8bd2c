"""What a BIDS App does besides segmenting: it accepts only BIDS datasets, and puts temporary files where it is told."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ensemble.errors import InputRefused
from ensemble.files import read_json, unreadable_reason
from ensemble.folders import unwritable_error
from ensemble.program import command_line

_DESCRIPTION = "dataset_description.json"


def check_bids_dataset(root: Path) -> None:
    """Raise InputRefused unless the folder's `dataset_description.json` declares a raw BIDS dataset (BIDS 1.10, "Dataset description").

    Other BIDS rules are left to the BIDS validator: this program needs only the file names.
    """
    path = root / _DESCRIPTION
    if not root.is_dir():
        raise InputRefused("the BIDS dataset does not exist", where=root, do="check the path")
    try:
        content: Any = read_json(path)
    except FileNotFoundError:
        raise _refused(root, f"no {_DESCRIPTION}") from None
    except OSError as error:
        why = unreadable_reason(path, error)
        raise InputRefused("the BIDS dataset can't be read", where=path, found=why.said, do=why.do) from error
    except ValueError as error:
        raise _refused(path, str(error)) from error
    if not isinstance(content, dict) or not content.get("Name") or not content.get("BIDSVersion"):
        raise _refused(path, "no Name, or no BIDSVersion")
    if (kind := content.get("DatasetType", "raw")) != "raw":
        raise _refused(path, f"DatasetType {kind}")


def _refused(where: Path, found: str) -> InputRefused:
    do = f"give a raw BIDS dataset, skip this check with --skip-bids-validation, or use {command_line('batch')} for other layouts"
    return InputRefused("the folder is not a raw BIDS dataset", where=where, found=found, do=do)


def use_work_folder(folder: Path) -> None:
    """Use a folder for the temporary files of this process and its children; create it if needed. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable_error(folder, error) from error
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder.absolute())
