"""Group frames into series, determine what each series shows, and choose one for a modality. Geometry is used only to join series."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ensemble.errors import InputRefused
from ensemble.readers.b_values import DIFFUSION_B, SAME_SHELL, USUAL_B
from ensemble.readers.dicom import facts
from ensemble.readers.dicom.facts import SeriesKind
from ensemble.readers.dicom.frames import CONVERT, Frame
from ensemble.types import Modality

#: Up to these, numbers of one series are the same: cosines of the axes, pixel spacing as a share of it.
SAME_COSINE, SAME_SPACING = 1e-3, 1e-3
#: Series that a note names; `inspect` lists all.
_MAX_LISTED = 12
_SHOWS = {Modality.DWI: SeriesKind.DWI, Modality.ADC: SeriesKind.ADC, Modality.FLAIR: SeriesKind.FLAIR}


@dataclass(frozen=True, eq=False)
class Series:
    """Frames that belong together by their headers, unsorted."""

    frames: tuple[Frame, ...]
    copies: tuple[tuple[Frame, Frame], ...] = ()
    """Frames that bear the SOP instance of another one, and say the same of themselves: left out. Each with the one that is kept."""

    @property
    def description(self) -> str:
        return self.frames[0].instance.description

    @property
    def number(self) -> int | None:
        return self.frames[0].instance.number

    @cached_property
    def folders(self) -> frozenset[Path]:
        return frozenset(frame.instance.path.parent for frame in self.frames)

    @cached_property
    def told_b(self) -> tuple[float, ...]:
        """The distinct b-values of its frames, sorted; empty for a map, whatever its header says."""
        maps = (
            SeriesKind.ADC,
            SeriesKind.EXPONENTIAL,
            SeriesKind.ANISOTROPY,
            SeriesKind.TENSOR,
            SeriesKind.DIFFUSIVITY,
        )
        return () if self.kind in maps else tuple(sorted({frame.b for frame in self.frames if frame.b is not None}))

    @cached_property
    def kind(self) -> SeriesKind | str:
        """What the series shows."""
        first = self.frames[0]
        if first.instance.other:
            return first.instance.other
        if (kind := facts.kind_from_image_type(first.image_type, first.codes)) is not None:
            return kind
        told = [frame.b for frame in self.frames if frame.b is not None]
        weighted = max(told, default=0.0) > SAME_SHELL
        shells = 2 if weighted and max(told) - min(told) > SAME_SHELL else len(told[:1])
        return facts.kind_from_description(first.instance.words, shells, weighted=weighted)

    @cached_property
    def usable_b(self) -> float | None:
        """The b-value nearest to 1000 among those used for stroke; None if there is none."""
        usable = [b for b in self.told_b if _is_usual(b)]
        return min(usable, key=lambda b: abs(b - USUAL_B)) if usable else None

    @property
    def is_trace(self) -> bool:
        """Whether it is the scanner's own mean over directions."""
        directions = {frame.direction for frame in self.frames}
        told = facts.is_trace(self.frames[0].image_type, self.description.lower())
        return told or ("isotropic" in directions and directions <= {"isotropic", "none"})

    def unfit(self, modality: Modality) -> str:
        """Return why the series can't be a modality, in a few words; empty if it may be."""
        if self.kind != _SHOWS[modality] and self.kind != SeriesKind.UNKNOWN:
            return str(self.kind)
        if modality is Modality.DWI and self.told_b and self.usable_b is None:
            return f"b = {format_b_values(self.told_b)} s/mm^2"
        named = facts.b_values_in_description(self.description.lower())
        if modality is Modality.DWI and not self.told_b and named and not any(map(_is_usual, named)):
            return f"named b = {format_b_values(named)} s/mm^2"
        return ""

    @property
    def title(self) -> str:
        """A short description of the series for messages."""
        number = f"{self.number}: " if self.number is not None else ""
        b_values = f", b = {format_b_values(self.told_b)}" if self.told_b else ""
        return f"'{number}{self.description or 'without description'}' ({len(self.frames)} images{b_values})"


def _is_usual(b: float) -> bool:
    return DIFFUSION_B[0] <= b <= DIFFUSION_B[1]


def format_b_values(b_values: Iterable[float]) -> str:
    """List b-values for messages; those of one shell once."""
    shells: list[float] = []
    for b in sorted(b_values):
        if not shells or b - shells[-1] > SAME_SHELL:
            shells.append(b)
    return ", ".join(f"{b:.4g}" for b in shells[:8]) + (", ..." if len(shells) > 8 else "")


def group_into_series(frames: Iterable[Frame]) -> list[Series]:
    """Group frames into series: by series UID, then by differences in image type and description.

    Copies of one SOP instance count once. Instances that each carry a series UID of their own are joined by description and geometry.
    """
    by_name: dict[tuple[object, ...], list[Frame]] = defaultdict(list)
    for frame in frames:
        about = frame.instance
        kind = about.other or facts.kind_from_image_type(frame.image_type, frame.codes)
        by_name[about.study, about.series, about.number, about.description, kind].append(frame)
    return [_without_copies(group) for group in _joined([*by_name.values()])]


def choose_series(series: Sequence[Series], modality: Modality, path: Path) -> tuple[Series, list[str]]:
    """Choose the series of a modality; also returns notes on the choice. Raises InputRefused, listing the candidates."""
    label = modality.label
    fitting = [each for each in series if each.kind == _SHOWS[modality]]
    good = [each for each in fitting if not each.unfit(modality)]
    if modality is Modality.DWI:
        good = _preferred(good)
    nameless = [each for each in series if not each.frames[0].instance.other and each.kind != SeriesKind.LOCALIZER]
    if not fitting and len(nameless) == 1 and nameless[0].kind == SeriesKind.UNKNOWN:
        fitting, good = nameless, [each for each in nameless if not each.unfit(modality)]
    if len(good) == 1:
        chosen = good[0]
        return chosen, [f"{label}: DICOM series {chosen.title}", *_passed_over(series, chosen, modality)]
    found = "; ".join(sorted(f"{each.title} {why}".strip() for each in series for why in [_why(each, modality)]))
    if good:
        raise InputRefused(
            f"several DICOM series could be the {label}",
            where=path,
            found=found,
            do="give a folder with only the right series",
        )
    if fitting:
        low, high = DIFFUSION_B
        raise InputRefused(
            "no DWI series has a b-value used for stroke",
            where=path,
            found=found,
            do=f"give a series with b between {low:.0f} and {high:.0f} s/mm^2",
        )
    raise InputRefused(
        f"no DICOM series looks like {label}",
        where=path,
        found=found,
        do=f"give the folder of the {label} series; if it is one of these, {CONVERT}",
    )


def _why(series: Series, modality: Modality) -> str:
    """Return in brackets why a series is not chosen, if its title does not say so."""
    unfit = series.unfit(modality)
    return f"[{unfit}]" if unfit and not unfit.startswith("b = ") else ""


def _preferred(series: list[Series]) -> list[Series]:
    """Return the DWI series nearest to the usual b-value, and among these the scanner's mean over directions."""
    away = {id(each): abs(each.usable_b - USUAL_B) if each.usable_b is not None else math.inf for each in series}
    nearest = min(away.values(), default=0.0)
    near = [each for each in series if away[id(each)] <= nearest + SAME_SHELL]
    return [each for each in near if each.is_trace] or near


def _passed_over(series: Sequence[Series], chosen: Series, modality: Modality) -> list[str]:
    """Return notes on other series that look like the modality, or can never be it."""
    wanted = {kind.value for kind in _SHOWS.values()} - {_SHOWS[modality].value}
    others = [
        each
        for each in series
        if each is not chosen
        and str(each.kind) not in (*wanted, SeriesKind.UNKNOWN, SeriesKind.OTHER, SeriesKind.LOCALIZER)
    ]
    if not others:
        return []
    words = sorted(f"{each.title} [{each.unfit(modality) or 'not the nearest'}]" for each in others)
    more = f"; and {len(words) - _MAX_LISTED} more" if len(words) > _MAX_LISTED else ""
    return [f"{modality.label}: not used: {'; '.join(words[:_MAX_LISTED])}{more}"]


def _joined(groups: list[list[Frame]]) -> list[list[Frame]]:
    """Return the groups, with those joined that share a series number (or have one instance each), a description and the geometry."""
    joined: list[list[Frame]] = []
    alike: dict[tuple[object, ...], list[list[Frame]]] = defaultdict(list)
    for group in groups:
        first = group[0]
        kind = first.instance.other or facts.kind_from_image_type(first.image_type, first.codes)
        alike[first.instance.study, first.instance.number, first.instance.description, kind].append(group)
    for candidates in alike.values():
        together: list[list[Frame]] = []
        for group in candidates:
            same = next((other for other in together if _belongs(group, other)), None)
            if same is None:
                together.append(group)
            else:
                same.extend(group)
        joined += together
    return joined


def _belongs(group: list[Frame], other: list[Frame]) -> bool:
    """Return whether a group of frames continues another one: slices, or volumes, with series UIDs of their own."""
    first, second = group[0], other[0]
    if not same_slice_geometry(first, second):
        return False
    if len(group) == 1 and len({frame.instance.series for frame in other}) == len(other):
        return True  # one slice each
    numbers = {frame.order for frame in other}
    return first.instance.number is not None and not any(frame.order in numbers for frame in group)


def same_slice_geometry(first: Frame, second: Frame) -> bool:
    """Return whether two slices have the same size, axes and pixel spacing, up to rounding; positions may differ."""
    one, other = first.plane, second.plane
    if one is None or other is None or first.size != second.size:
        return False
    turned = max(abs(a - b) for a, b in zip(one.orientation, other.orientation, strict=True))
    stretched = max(abs(a / b - 1) for a, b in zip(one.spacing, other.spacing, strict=True))
    return turned <= SAME_COSINE and stretched <= SAME_SPACING


def _without_copies(frames: list[Frame]) -> Series:
    """Return a series in which each SOP instance counts once; instances with one UID but different headers are kept."""
    first: dict[tuple[object, ...], Frame] = {}
    kept: list[Frame] = []
    copies: list[tuple[Frame, Frame]] = []
    for frame in frames:
        other = frame
        if frame.instance.sop_instance:
            other = first.setdefault((frame.instance.sop_instance, frame.index, frame.tile), frame)
        if other is not frame and frame.same_as(other):
            copies.append((other, frame))
        else:
            kept.append(frame)
    return Series(tuple(kept), tuple(copies))
