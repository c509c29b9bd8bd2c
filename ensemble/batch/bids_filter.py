"""`--bids-filter-file`: select images of a BIDS dataset by the entities in their names, in the format of fMRIPrep's filter files."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensemble.batch.layouts import FoundImage
from ensemble.errors import UsageError
from ensemble.files import error_in_words, read_json
from ensemble.readers.names import image_suffix, stem
from ensemble.types import Modality

log = logging.getLogger(__name__)

#: What filter files call entities (PyBIDS), and how names abbreviate them (BIDS 1.10).
_ENTITIES = {
    "subject": "sub", "session": "ses", "task": "task", "acquisition": "acq", "ceagent": "ce", "reconstruction": "rec",
    "direction": "dir", "run": "run", "modality": "mod", "echo": "echo", "flip": "flip", "inversion": "inv", "mt": "mt",
    "part": "part", "recording": "recording", "space": "space", "split": "split", "description": "desc",
    "resolution": "res", "density": "den", "label": "label", "chunk": "chunk",
}  # fmt: skip
#: What is no key-value pair in a name.
_OTHERS = ("suffix", "extension", "datatype")
_PAIR = re.compile(r"([A-Za-z0-9]+)-([A-Za-z0-9+]+)")
_ANY, _NONE = ("*", "Query.ANY", "Query.REQUIRED"), ("Query.NONE",)


@dataclass(frozen=True)
class ImageFilter:
    """The BIDS entities that an image of each modality must have."""

    wanted: Mapping[Modality, Mapping[str, Any]] = field(default_factory=dict)

    def __call__(self, image: FoundImage) -> bool:
        """Return whether an image may be taken."""
        entities = _entities_of(image.path)
        return all(_fits(value, entities.get(name)) for name, value in self.wanted.get(image.modality, {}).items())


def read_filter(path: Path) -> ImageFilter:
    """Read a filter file: `{"dwi": {"acquisition": "b1000", "run": [1, 2], "space": null}}`, with the keys dwi, adc and flair.

    Keys for other programs are noted. Raises UsageError.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        found = error_in_words(error)
        raise UsageError(
            "the BIDS filter file can't be read", where=path, found=found, do="give a JSON file"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise _no_filter(path, "it is not a JSON object of objects")
    wanted = {}
    for key, entities in content.items():
        if key.lower() not in tuple(Modality):
            log.info("note: the key %s of the BIDS filter file is ignored", key)
            continue
        if unknown := sorted(set(entities) - {*_ENTITIES, *_ENTITIES.values(), *_OTHERS}):
            raise _no_filter(path, f"{key} has {', '.join(unknown)}")
        wanted[Modality(key.lower())] = {_ENTITIES.get(name, name): value for name, value in entities.items()}
    if not wanted:
        raise _no_filter(path, f"keys {', '.join(content) or 'none'}")
    return ImageFilter(wanted)


def _no_filter(path: Path, found: str) -> UsageError:
    return UsageError(
        "the BIDS filter file is not valid",
        where=path,
        found=found,
        do='write {"dwi": {"acquisition": "b1000"}, "adc": {...}, "flair": {...}}, with entities among '
        + ", ".join((*_ENTITIES, *_OTHERS)),
    )


def _entities_of(path: Path) -> dict[str, str]:
    *pairs, suffix = stem(path).split("_")
    named = {match[1]: match[2] for match in map(_PAIR.fullmatch, pairs) if match}
    return named | {"suffix": suffix, "extension": image_suffix(path), "datatype": path.parent.name}


def _fits(wanted: Any, found: str | None) -> bool:
    """Return whether an entity matches: one value or any of several; null or Query.NONE for absent; zero-padding is ignored."""
    if isinstance(wanted, list):
        return any(_fits(one, found) for one in wanted)
    if wanted is None or wanted in _NONE:
        return found is None
    if found is None:
        return False
    if wanted in _ANY or str(wanted) == found:
        return True
    return str(wanted).isdecimal() and found.isdecimal() and int(wanted) == int(found)
