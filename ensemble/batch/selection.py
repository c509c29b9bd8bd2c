"""Select which cases of a dataset one call processes: some participants and sessions, or one shard."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemble.batch.layouts import FoundCase
from ensemble.errors import InputRefused
from ensemble.outputs.layouts.bids_entities import BidsEntities

Placed = tuple[FoundCase, BidsEntities]


@dataclass(frozen=True)
class CaseSelection:
    """Which cases to process: some participants, sessions or one shard; by default all."""

    participants: tuple[str, ...] = ()
    """BIDS labels of subjects, with or without `sub-`."""
    sessions: tuple[str, ...] = ()
    """BIDS labels of sessions, with or without `ses-`."""
    shard: tuple[int, int] | None = None
    """(i, n): shard i, counted from 1, of n shards."""

    def of(self, cases: Sequence[FoundCase], places: Mapping[str, BidsEntities], dataset: Path) -> list[Placed]:
        """Return the selected cases with their entities. Raises InputRefused for a participant or session that the dataset lacks."""
        paired = [(case, places[case.name]) for case in cases]
        for kind, labels, whose in (
            ("participant", _bare(self.participants, "sub-"), lambda place: place.subject),
            ("session", _bare(self.sessions, "ses-"), lambda place: place.session),
        ):
            if not labels:
                continue
            there = {whose(place) for _, place in paired} - {""}
            if missing := [label for label in labels if label not in there]:
                narrowed = kind == "session" and self.participants
                raise InputRefused(
                    f"the {'selected participants have' if narrowed else 'dataset has'} no {kind} {', '.join(missing)}",
                    where=dataset,
                    found=_some(sorted(there)) or f"no {kind}",
                    do=f"give labels that exist (--{kind}-label), with leading zeros",
                )
            paired = [(case, place) for case, place in paired if whose(place) in labels]
        return [(case, place) for case, place in paired if self.shard is None or is_in_shard(case.name, *self.shard)]


def is_in_shard(name: str, number: int, shares: int) -> bool:
    """Return whether the case `name` belongs to shard `number` (from 1) of `shares`; only its name counts, so new cases move no other."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % shares == number - 1


def _bare(labels: Sequence[str], prefix: str) -> list[str]:
    return [label.removeprefix(prefix) for label in labels]


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
