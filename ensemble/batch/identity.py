"""What a result was made of: a digest over inputs, weights, options and program, by which a rerun knows whether it still holds."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ensemble import __version__
from ensemble.config import RunConfig
from ensemble.errors import InputRefused
from ensemble.members.manifest import file_sha256
from ensemble.members.spec import MemberSpec
from ensemble.readers.imagefile import stem
from ensemble.report.extras import Extras
from ensemble.types import Modality

#: Where the weights lie and what computes does not decide what comes out.
_IMMATERIAL = {"weights", "device"}
_DATA_FILE = re.compile(rb"^\s*(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)


def recipe(
    specs: tuple[MemberSpec, ...], digests: Mapping[str, Mapping[str, str]], config: RunConfig, extras: Extras
) -> dict[str, Any]:
    """Everything but the images that decides about a result: ready for JSON."""
    options = {name: value for name, value in config.as_json().items() if name not in _IMMATERIAL}
    members = [spec.as_json() | {"sha256": dict(digests[spec.name])} for spec in specs]
    return {"version": __version__, "options": options | vars(extras), "members": members}


def result_key(recipe: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]]) -> str:
    """SHA-256 over the recipe and the digests of the images."""
    content = json.dumps({"recipe": recipe, "inputs": inputs}, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def input_digests(files: Mapping[Modality, Path]) -> dict[str, dict[str, str]]:
    """Digest of each file that an image consists of, by modality and name. Raises InputRefused for one that can't be read."""
    digests: dict[str, dict[str, str]] = {}
    for modality, path in files.items():
        try:
            digests[modality.value] = {name: file_sha256(file) for name, file in source_files(path)}
        except OSError as error:
            raise InputRefused(
                f"the {modality.value.upper()} image can't be read",
                where=error.filename or path,
                found=error.strerror or type(error).__name__,
                do="check that it is there, and its permissions",
            ) from error
    return digests


def state_of(files: Mapping[Modality, Path]) -> tuple[Any, ...]:
    """Changes when a file is replaced or written to; None in place of what is not there."""
    return tuple(_stat(file) for path in files.values() for _, file in source_files(path))


def source_files(path: Path) -> Iterator[tuple[str, Path]]:
    """Files that an image consists of, with their names below its folder.

    That is the file itself, with its b-values (FSL's .bval) and the data file that its header names, where there are such; or all of a
    folder.
    """
    if path.is_dir():
        for folder, _, names in sorted(os.walk(path)):
            yield from ((Path(folder, name).relative_to(path).as_posix(), Path(folder, name)) for name in sorted(names))
        return
    yield path.name, path
    if (b_values := path.with_name(stem(path) + ".bval")).is_file():
        yield b_values.name, b_values
    if path.suffix.lower() in (".mhd", ".nhdr") and path.is_file():
        with path.open("rb") as header:
            for named in _DATA_FILE.findall(header.read(65536)):
                if (data := path.parent / os.fsdecode(named)).is_file():
                    yield os.fsdecode(named), data


def _stat(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
