"""The description of a member before its networks are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ensemble.errors import WeightsBroken
from ensemble.families.names import member_name_problem

#: The file of a packed member with the content of its manifest entry.
PACKED_MEMBER_FILE = "member.json"
#: Where a user finds the entry of a member.
ENTRY_FILES = f"the member's entry in manifest.json, or a packed member's {PACKED_MEMBER_FILE}"
#: Volume (ml) below which lesions are removed on which the members disagree, where no entry gives another.
MIN_DISPUTED_ML = 0.1


@dataclass(frozen=True)
class MemberSpec:
    """One member, as its manifest entry describes it."""

    name: str
    """The name it votes under, and its output files go by."""
    kind: str
    """How its files are read: a family's word in the manifest (see `registry.py`)."""
    folder: Path
    """Where its files are."""
    channels: tuple[str, ...] | None = None
    """What each input channel shows, for example ("DWI", "ADC", "DWI[-1]"); None means that its own files say so."""
    intensities: Literal["native", "tissue_normalized"] = "native"
    """Whether it wants images as read, or tissue-normalised ones (see `prepare/units.py`)."""
    orientation: Literal["native", "canonical"] = "native"
    """Whether arrays are brought to the nearest LPS axes before the networks, and back afterwards."""
    spacing_mm: tuple[float, ...] = ()
    """Voxel spacing (z, y, x) or in-plane (y, x) that its networks work at; empty when its own files say so."""
    licence: str = ""
    """SPDX identifier of the weights' licence."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Digest of each file, by path relative to the folder; files of unknown origin have none."""
    weight: float = 1.0
    """Weight of its vote in a majority."""
    min_lesion_ml: float = 0.0
    """Volume below which its ensemble removes lesions; 0 keeps all."""
    min_disputed_ml: float = MIN_DISPUTED_ML
    """Volume below which its ensemble removes lesions about which the members disagree; 0 keeps all."""
    listed: bool = field(default=False, compare=False)
    """Whether a manifest names these digests, and so vouches for code in the files; a packed member's own word does not."""

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], folder: Path) -> MemberSpec:
        """Read a manifest entry.

        Raises KeyError, TypeError or ValueError for an entry that is incomplete or invalid, or whose name could lead out of the output
        folder.
        """
        if problem := member_name_problem(entry["name"]):
            raise ValueError(problem)
        channels = entry.get("channels")
        return cls(
            name=entry["name"],
            kind=str(entry["kind"]),
            folder=folder,
            channels=_texts(channels) if channels is not None else None,
            intensities=_choice(
                entry, "intensities", ("native", "tissue_normalized"), {"physical": "tissue_normalized"}
            ),
            orientation=_choice(entry, "orientation", ("native", "canonical")),
            spacing_mm=tuple(float(mm) for mm in entry.get("spacing_mm", ())),
            licence=str(entry.get("licence", "")),
            sha256=dict(entry.get("sha256", {})),
            weight=_number(entry, "weight", 1.0, above=0.0),
            min_lesion_ml=_number(entry, "min_lesion_ml", 0.0),
            min_disputed_ml=_number(entry, "min_disputed_ml", MIN_DISPUTED_ML),
        )

    def as_json(self) -> dict[str, Any]:
        """Return the manifest entry without the folder; `from_json` reads it."""
        entry: dict[str, Any] = {"name": self.name, "kind": self.kind}
        if self.channels is not None:
            entry["channels"] = list(self.channels)
        rule = {
            "weight": (self.weight, 1.0),
            "min_lesion_ml": (self.min_lesion_ml, 0.0),
            "min_disputed_ml": (self.min_disputed_ml, MIN_DISPUTED_ML),
        }
        entry |= {key: value for key, (value, usual) in rule.items() if value != usual}
        return entry | {
            "intensities": self.intensities,
            "orientation": self.orientation,
            "spacing_mm": list(self.spacing_mm),
            "licence": self.licence,
            "sha256": dict(self.sha256),
        }


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"channels is {value!r}, no list of names such as DWI")
    return tuple(value)


def require_native_images(spec: MemberSpec) -> None:
    """Raise WeightsBroken if a manifest entry asks for normalised intensities or reorientation, for networks that take images as read."""
    if (spec.intensities, spec.orientation) != ("native", "native"):
        raise WeightsBroken(
            f"member {spec.name} only accepts images as read",
            where=spec.folder,
            found=f"{spec.intensities} intensities, {spec.orientation} orientation in its manifest entry",
            do=f"remove both, or set them to native, in {ENTRY_FILES}",
        )


def _number(entry: Mapping[str, Any], key: str, usual: float, above: float | None = None) -> float:
    value = entry.get(key, usual)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    if not fits or (above is not None and value <= above):
        raise ValueError(f"{key} is {value!r}, not a number {'above' if above is not None else 'from'} 0")
    return float(value)


def _choice(
    entry: Mapping[str, Any], key: str, allowed: tuple[str, str], former: Mapping[str, str] = MappingProxyType({})
) -> Any:
    """Return the value of an entry; values that earlier versions used (`former`) are translated. Raises ValueError."""
    value = entry.get(key, allowed[0])
    value = former.get(value, value) if isinstance(value, str) else value
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}, not one of {', '.join(allowed)}")
    return value
