"""Valid names of members: they become part of output file names."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

#: File systems take 255 bytes for a file's name, and batches put a case's name before a member's.
MAX_CHARACTERS = 100
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def member_name_problem(name: object) -> str:
    """Return why a value is not a valid member name; empty if it is valid."""
    if isinstance(name, str) and _NAME.fullmatch(name) and name not in (".", "..") and len(name) <= MAX_CHARACTERS:
        return ""
    return f"the name {name!r} is not valid: use letters, digits, '.', '_' and '-' only, {MAX_CHARACTERS} at most, not '.' or '..'"


def member_name_from_path(path: str) -> str:
    """Return a valid member name made from a path."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.replace("/", "__"))
    return name if not member_name_problem(name) else _with_digest(name, path)


def make_names_unique(names: Sequence[str], origins: Sequence[str]) -> list[str]:
    """Return the names; those equal up to case get a digest of their origin appended."""
    often = Counter(name.lower() for name in names)
    told = [
        name if often[name.lower()] == 1 else _with_digest(name, origin)
        for name, origin in zip(names, origins, strict=True)
    ]
    if len({name.lower() for name in told}) == len(told):
        return told
    return [_with_digest(name, origin) for name, origin in zip(names, origins, strict=True)]


def _with_digest(name: str, origin: str) -> str:
    digest = hashlib.sha256(origin.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{name.strip('.')[-(MAX_CHARACTERS - 9) :]}x{digest}"
