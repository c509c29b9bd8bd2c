"""Compute digests of weights and cache them, since hashing gigabytes takes seconds at each start.

A file is identified by its path, device, inode, size, and the times at which its content and its inode were last changed. If times have
fractions of a second, no replacement of a file or write into it leaves all of these unchanged. If they have none, digests are not cached:
two Apptainer images (squashfs) may show different weights with all of these the same. Digests of large files are cached in the user's
cache folder (XDG Base Directory Specification), to which no other user may write; without such a folder they are computed each time.
Damage by the disk itself is not noticed in this way; `members check` reads all files anew.
"""

from __future__ import annotations

import json
import os
import stat
import time
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from ensemble.files import file_sha256
from ensemble.weights.folder import convert_folder_errors

#: Smaller files are hashed in no time.
KEPT_FROM_BYTES = 64 << 20
#: A file changed so shortly before may be changed again with the same time stamp (s).
_SETTLED_S = 2.0
_SECOND_NS = 10**9

Stamp = tuple[int, int, int, int, int]


def weights_sha256(path: Path, *, anew: bool = False) -> str:
    """Return a file's hexadecimal SHA-256. A file that has not changed since is hashed again only if `anew`. Raises WeightsBroken."""
    with convert_folder_errors(path):
        return file_sha256(path) if anew else _sha256(path.resolve(), _stamp(path))


@lru_cache(maxsize=1024)
def _sha256(path: Path, stamp: Stamp) -> str:
    size = stamp[2]
    entry = _entry(path) if size >= KEPT_FROM_BYTES else None
    if entry is None:
        return file_sha256(path)
    if (known := _read(entry, stamp)) is not None:
        return known
    digest = file_sha256(path)
    if _tells_changes(stamp) and _stamp(path) == stamp:
        _write(entry, stamp, digest)
    return digest


def _tells_changes(stamp: Stamp) -> bool:
    """Return whether a further change would show in the stamp: the time of the last is past, and noted to fractions of a second."""
    changed = stamp[4]
    return changed % _SECOND_NS != 0 and max(stamp[3:]) < time.time_ns() - _SETTLED_S * _SECOND_NS


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _entry(path: Path) -> Path | None:
    """Return the cache file of a file's digest; None without a folder to which only this user may write."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.environ.get("HOME", ""), ".cache")
    cache = next((folder for folder in caches if folder.is_absolute()), None)  # the standard: relative ones are none
    if cache is None:
        return None
    folder = cache / "isles-ensemble" / "digests"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder / sha256(os.fsencode(path)).hexdigest() if _is_ours(folder) else None
    except OSError:
        return None


def _is_ours(path: Path) -> bool:
    """Return whether no other user may write there, since cached digests must be trustworthy."""
    found = path.lstat()
    return found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o022


def _read(entry: Path, stamp: Stamp) -> str | None:
    try:
        if not _is_ours(entry):
            return None
        kept = json.loads(entry.read_text(encoding="ascii"))
        digest = kept["sha256"]
        right = kept["stamp"] == list(stamp) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")
        return str(digest) if right else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(entry: Path, stamp: Stamp, digest: str) -> None:
    draft = entry.with_name(f"{entry.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps({"stamp": stamp, "sha256": digest}), encoding="ascii")
        draft.chmod(0o600)
        draft.replace(entry)
    except OSError:  # full, or no longer writable: it is computed anew next time
        draft.unlink(missing_ok=True)
