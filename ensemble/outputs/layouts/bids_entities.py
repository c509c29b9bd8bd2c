"""The BIDS labels of each case, which determine its output folder."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_BIDS = re.compile(r"^sub-(?P<subject>[A-Za-z0-9]+)(?:[/_]ses-(?P<session>[A-Za-z0-9]+))?$")


#: Files' names have this and more before their ending; file systems take 255 bytes.
_LONGEST = 100


@dataclass(frozen=True, order=True)
class BidsEntities:
    """The BIDS labels of a case."""

    subject: str
    session: str = ""

    @property
    def folder(self) -> Path:
        """The case's folder, relative to the output folder."""
        return Path(f"sub-{self.subject}", *([f"ses-{self.session}"] if self.session else []))

    @property
    def prefix(self) -> str:
        """The prefix of its file names."""
        return "_".join(self.folder.parts)


def assign_entities(cases: Sequence[str]) -> dict[str, BidsEntities]:
    """Return unique BIDS labels for each case, derived from all case names.

    BIDS labels are kept. Labels hold letters and digits only, so that other names lose the rest; where that makes two alike, leaves
    nothing, or too much for a file's name, a digest of the whole name is added.
    """
    wanted = {name: _entities(name) for name in cases}
    # names that differ in case only would meet on some file systems
    crowd = Counter(place.prefix.lower() for place in wanted.values())
    parents = {place.subject.lower() for place in wanted.values() if place.session}

    def settled(name: str, place: BidsEntities) -> BidsEntities:
        in_the_way = not place.session and place.subject.lower() in parents
        long = len(place.prefix) > _LONGEST
        if place.subject and crowd[place.prefix.lower()] == 1 and not in_the_way and not long:
            return place
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8]
        return BidsEntities(f"{place.subject[:_LONGEST]}x{digest}", "" if long else place.session)

    return {name: settled(name, place) for name, place in wanted.items()}


def _entities(name: str) -> BidsEntities:
    if bids := _BIDS.match(name):
        return BidsEntities(bids["subject"], bids["session"] or "")
    return BidsEntities(re.sub(r"[^A-Za-z0-9]", "", name.removeprefix("sub-")))
