"""Findings of a case as plain dataclasses, from which reports, pages and tables are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Pattern = Literal["none", "single", "scattered"]


@dataclass(frozen=True)
class UncertainQuantity:
    """A measured number, and its range over the voters' masks and over small registration errors."""

    value: float
    members: tuple[float, float]
    """Least and most of the mask and each voter's own."""
    placement: tuple[float, float] | None = None
    """Least and most where the brain lay a little elsewhere in the template; None for what needs no template."""

    @classmethod
    def of(cls, value: float, members: Iterable[float], placement: Iterable[float] | None = None) -> UncertainQuantity:
        return cls(value, _ends([value, *members]), None if placement is None else _ends([value, *placement]))

    def as_json(self, digits: int) -> dict[str, Any]:
        found: dict[str, Any] = {"value": round(self.value, digits), "members": _rounded(self.members, digits)}
        return found if self.placement is None else found | {"placement": _rounded(self.placement, digits)}


@dataclass(frozen=True)
class UncertainCategory:
    """A category, and the others that a voter's mask or a small registration error would give."""

    value: str
    members: tuple[str, ...]
    """What the mask and the voters' own masks say, each word once."""
    placement: tuple[str, ...]
    """What it would be where the brain lay a little elsewhere in the template."""

    @classmethod
    def of(cls, value: str, members: Iterable[str], placement: Iterable[str]) -> UncertainCategory:
        return cls(value, tuple(sorted({value, *members})), tuple(sorted({value, *placement})))

    @property
    def possible(self) -> tuple[str, ...]:
        """All possible categories, the likeliest first."""
        return tuple(dict.fromkeys((self.value, *self.placement, *self.members)))

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "members": list(self.members), "placement": list(self.placement)}


@dataclass(frozen=True)
class StructureVolume:
    """The volume and share of the lesion inside one structure (or side, region, label)."""

    name: str
    ml: UncertainQuantity
    share: UncertainQuantity
    """Of the whole lesion, 0 to 1."""

    @classmethod
    def of(
        cls,
        name: str,
        own: tuple[float, float],
        members: Sequence[tuple[float, float]],
        elsewhere: Sequence[tuple[float, float]],
    ) -> StructureVolume:
        """Make it from the volumes (ml) in the structure and of the whole lesion: of the mask, of the voters, and at perturbed positions.

        A voter without lesion has no share.
        """

        def share(part: tuple[float, float]) -> float:
            return part[0] / max(part[1], 1e-9)

        with_lesion = [member for member in members if member[1] > 0]
        return cls(
            name,
            UncertainQuantity.of(own[0], [ml for ml, _ in members], [ml for ml, _ in elsewhere]),
            UncertainQuantity.of(share(own), map(share, with_lesion), map(share, elsewhere)),
        )

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "ml": self.ml.as_json(4), "share": self.share.as_json(4)}


@dataclass(frozen=True)
class LesionFinding:
    """Volume, centre and location of one lesion (26-connected component of the mask)."""

    volume_ml: float
    centre_lps_mm: tuple[float, float, float]
    centre_mni_mm: tuple[float, float, float] | None = None
    """RAS, as atlases have it; this and what follows is None if the brain's place in the template is not known."""
    side: UncertainCategory | None = None
    region: UncertainCategory | None = None
    structure: UncertainCategory | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "volume_ml": round(self.volume_ml, 4),
            "centre_lps_mm": [round(mm, 1) for mm in self.centre_lps_mm],
            "centre_mni_mm": None if self.centre_mni_mm is None else [round(mm, 1) for mm in self.centre_mni_mm],
            "side": _choice(self.side),
            "region": _choice(self.region),
            "structure": _choice(self.structure),
        }


@dataclass(frozen=True)
class LesionLocations:
    """Locations of the lesions by the built-in atlas."""

    side: UncertainCategory | None
    """None without lesion, as are the lists empty."""
    sides: tuple[StructureVolume, ...]
    regions: tuple[StructureVolume, ...]
    structures: tuple[StructureVolume, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "side": _choice(self.side),
            "sides": [amount.as_json() for amount in self.sides],
            "regions": [amount.as_json() for amount in self.regions],
            "structures": [amount.as_json() for amount in self.structures],
        }


@dataclass(frozen=True)
class AspectsScore:
    """The ASPECTS of one hemisphere: ten minus the number of its regions of which more than a stated fraction is lesion."""

    side: str
    score: UncertainQuantity
    affected: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"side": self.side, "score": self.score.as_json(0), "affected": list(self.affected)}


@dataclass(frozen=True)
class RegionShare:
    """The share of a region that is lesion, 0 to 1."""

    name: str
    share: UncertainQuantity


@dataclass(frozen=True)
class AspectsFindings:
    """The findings from a label map named aspects. For research."""

    share_above: float
    """From which share on a region counts."""
    regions: tuple[RegionShare, ...]
    scores: tuple[AspectsScore, ...]
    """Of each side that has ten regions."""

    def as_json(self) -> dict[str, Any]:
        return {
            "notice": "research: not a validated score",
            "share_above": self.share_above,
            "regions": [{"name": one.name, "share": one.share.as_json(4)} for one in self.regions],
            "scores": [score.as_json() for score in self.scores],
        }


@dataclass(frozen=True)
class AtlasFindings:
    """The findings from one of the user's label maps."""

    name: str
    file: str
    sha256: str
    space: str
    """As stated by its name, sidecar or header; otherwise "not stated"."""
    mismatch: str
    """What is to be thought of where that is not the template's space; empty if it is."""
    labels: tuple[StructureVolume, ...]
    groups: tuple[StructureVolume, ...]
    """Empty if the table has none, as are the next ones."""
    sided_groups: tuple[StructureVolume, ...]
    """By group and side: "MCA left"."""
    outside: UncertainQuantity
    """Of the lesion, ml in no label."""
    leading: UncertainCategory | None
    """The group (or label, where there are no groups) with most of the lesion; None if no part of the lesion is in any."""
    leading_side: UncertainCategory | None
    aspects: AspectsFindings | None
    """Only of a map called aspects."""

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "name": self.name,
            "file": self.file,
            "sha256": self.sha256,
            "space": self.space,
            "mismatch": self.mismatch,
            "labels": [amount.as_json() for amount in self.labels],
            "groups": [amount.as_json() for amount in self.groups],
            "groups_by_side": [amount.as_json() for amount in self.sided_groups],
            "outside_ml": self.outside.as_json(4),
            "leading": _choice(self.leading),
            "leading_side": _choice(self.leading_side),
        }
        return found if self.aspects is None else found | {"aspects": self.aspects.as_json()}


@dataclass(frozen=True)
class TemplateRegistration:
    """How well the brain was registered to the template, and why it could not be, if so."""

    template: str
    problems: tuple[str, ...]
    """Why the map is not used; empty if it is."""
    checks: dict[str, Any]
    matrix: tuple[tuple[float, ...], ...] | None
    """4x4, from points of the DWI to points of the template (LPS, mm)."""

    @property
    def holds(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {
            "template": self.template,
            "status": "ok" if self.holds else "failed",
            "problems": list(self.problems),
            "checks": self.checks,
            "matrix_lps": None if self.matrix is None else [list(row) for row in self.matrix],
        }


@dataclass(frozen=True)
class Findings:
    """The findings of a case, each with its range."""

    volume_ml: UncertainQuantity
    count: UncertainQuantity
    largest_ml: UncertainQuantity
    pattern: UncertainCategory
    """none, single (one lesion holds nearly all), or scattered."""
    registered: TemplateRegistration
    lesions: tuple[LesionFinding, ...]
    """Largest first."""
    places: LesionLocations | None
    """None if the brain could not be registered to the template: `registered` says why."""
    atlases: tuple[AtlasFindings, ...] = ()
    """Empty likewise."""
    seconds: float = 0.0
    """How long it took to find all this."""

    def as_json(self) -> dict[str, Any]:
        return {
            "volume_ml": self.volume_ml.as_json(4),
            "count": self.count.as_json(0),
            "largest_ml": self.largest_ml.as_json(4),
            "pattern": {"value": self.pattern.value, "members": list(self.pattern.members)},
            "registration": self.registered.as_json(),
            "places": None if self.places is None else self.places.as_json(),
            "lesions": [lesion.as_json() for lesion in self.lesions],
            "atlases": [atlas.as_json() for atlas in self.atlases],
        }


def _choice(choice: UncertainCategory | None) -> dict[str, Any] | None:
    return None if choice is None else choice.as_json()


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _rounded(ends: tuple[float, float], digits: int) -> list[float]:
    return [round(end, digits) for end in ends]
