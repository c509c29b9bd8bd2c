"""What a result was made from: a digest of inputs, weights, options and program version. A rerun compares it to reuse results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ensemble import __version__
from ensemble.config import IMMATERIAL, ExtraOutputs, RunConfig
from ensemble.errors import InputRefused
from ensemble.families.spec import MemberSpec
from ensemble.files import file_sha256, unreadable_reason
from ensemble.findings.maps import read_label_maps
from ensemble.readers.sources import Stamp, image_stamps, source_files
from ensemble.trust.reference import reference_digests
from ensemble.types import Modality


def describe_recipe(
    specs: tuple[MemberSpec, ...], digests: Mapping[str, Mapping[str, str]], config: RunConfig, extras: ExtraOutputs
) -> dict[str, Any]:
    """Return the recipe of a result as JSON data: all that determines it except the images (program version, member weights, options)."""
    options = {name: value for name, value in config.as_json().items() if name not in IMMATERIAL}
    members = [spec.as_json() | {"sha256": dict(digests[spec.name])} for spec in specs]
    written = {name: value for name, value in vars(extras).items() if name != "atlas"}
    maps = {} if extras.atlas is None else {"atlas": {one.name: one.sha256 for one in read_label_maps(extras.atlas)}}
    usual = {"trust_files": reference_digests(config.weights_folder)} if config.trust else {}
    return {"version": __version__, "options": options | written | maps | usual, "members": members}


def result_key(recipe: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]]) -> str:
    """Return the key of a result: the SHA-256 of its recipe and of the digests of its images."""
    content = json.dumps({"recipe": recipe, "inputs": inputs}, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def input_digests(files: Mapping[Modality, Path]) -> dict[str, dict[str, str]]:
    """Return the SHA-256 of each file of the images, by modality and name. Raises InputRefused if a file can't be read."""
    digests: dict[str, dict[str, str]] = {}
    for modality, path in files.items():
        with _reading(modality, path):
            digests[modality.value] = {name: file_sha256(file) for name, file in source_files(path)}
    return digests


def input_stamps(files: Mapping[Modality, Path]) -> dict[Path, Stamp | None]:
    """Return inode, size and modification time of the files, to notice changes. Raises as `input_digests` does."""
    found: dict[Path, Stamp | None] = {}
    for modality, path in files.items():
        with _reading(modality, path):
            found |= image_stamps([path])
    return found


@contextmanager
def _reading(modality: Modality, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = Path(error.filename or path)
        why = unreadable_reason(where, error)
        raise InputRefused(
            f"the {modality.label} image can't be read", where=where, found=why.said, do=why.do
        ) from error
