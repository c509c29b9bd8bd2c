"""The user's label maps (`--atlas`) in MNI space, named as in BIDS: arterial territories, ASPECTS regions or others."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from ensemble.errors import InputRefused, UsageError
from ensemble.files import error_in_words, file_sha256, read_bounded, read_json, unreadable_reason
from ensemble.findings.locations import LesionVoxels, transform_points
from ensemble.findings.template import SPACE, shipped_template
from ensemble.findings.types import (
    AspectsFindings,
    AspectsScore,
    AtlasFindings,
    RegionShare,
    StructureVolume,
    UncertainCategory,
    UncertainQuantity,
)
from ensemble.geometry import Grid
from ensemble.readers.nifti import read_nifti_header
from ensemble.readers.stored import read_stored
from ensemble.text import escape_invisible
from ensemble.types import AnyArray, FloatArray

_ENDINGS = ("_dseg.nii.gz", "_dseg.nii")
_MAX_TABLE_BYTES = 4 << 20
_TABLE = "a tab-separated UTF-8 table (.tsv) with the columns 'index' and 'name', and optionally 'group' and 'side'"
_SIDES = ("left", "right")
#: Other ways to write a side in a table.
_SPELT = {
    "l": "left",
    "r": "right",
    "lh": "left",
    "rh": "right",
    **dict.fromkeys(("n/a", "both", "bilateral", "midline"), ""),
}
#: Share of a region that must be lesion for the region to count as affected. Our own convention, not validated; every report states it.
ASPECTS_SHARE = 0.2
_ASPECTS_REGIONS = 10
#: Minimum share of the labelled voxels inside the template's brain.
_MIN_INSIDE = 0.5
#: A label has a side if its centre is this far (mm) from the midline, and this share of it is on that side.
_OFF_MIDLINE_MM, _ON_ONE_SIDE = 4.0, 0.9
#: FSL's MNI152 grids at 1 and 2 mm, by which maps without a stated template are recognised.
_FSL_SIZES = ((182, 218, 182), (91, 109, 91))


@dataclass(frozen=True)
class Label:
    """A label of a label map, as a row of its table describes it."""

    index: int
    name: str
    group: str
    """Empty if the table has no groups."""
    side: str
    """left, right or empty, by the table or by its position."""


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A label map and its label table."""

    name: str
    file: str
    sha256: str
    array: AnyArray
    """(z, y, x): position in `labels` plus 1; 0 if there is none."""
    grid: Grid
    labels: tuple[Label, ...]
    space: str
    mismatch: str

    @property
    def numbered(self) -> Iterator[tuple[int, Label]]:
        """The labels, each with its number in `array`."""
        return enumerate(self.labels, start=1)

    def chosen(self, group: str, side: str | None = None) -> list[int]:
        """Return the numbers in `array` of a group's labels, optionally of one side."""
        return [n for n, label in self.numbered if label.group == group and side in (None, label.side)]

    @property
    def is_aspects(self) -> bool:
        return "aspects" in [part.rpartition("-")[2].lower() for part in self.name.split("_")]


@lru_cache(maxsize=1)
def read_label_maps(folder: Path) -> tuple[LabelMap, ...]:
    """Read all label maps of a folder: `<name>_dseg.nii.gz`, each with `<name>_dseg.tsv` (and an optional `<name>_dseg.json`).

    Raises UsageError for a folder without a label map, and for a map that can't be used.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.name.endswith(_ENDINGS) and path.name[0] != ".")
    except OSError as error:
        raise UsageError(
            "the folder of --atlas can't be read",
            where=folder,
            found=error.strerror or str(error),
            do="give an existing folder that this user may read",
        ) from error
    if not files:
        raise UsageError(
            "the folder of --atlas has no label map",
            where=folder,
            do="name each label map <name>_dseg.nii.gz, each with <name>_dseg.tsv (columns 'index', 'name'; optional 'group', 'side')",
        )
    return tuple(read_label_map(path) for path in files)


def read_label_map(path: Path) -> LabelMap:
    """Read one label map with its table. Raises UsageError if either can't be used."""
    name = next(path.name.removesuffix(ending) for ending in _ENDINGS if path.name.endswith(ending))
    try:
        stored = read_stored(path, "atlas")
        digest = file_sha256(path)
    except InputRefused as refused:
        raise UsageError(refused.what, where=path, found=refused.found, do=refused.do) from refused
    values = stored.values(np.float64)
    values = values[0] if values.ndim == 4 and len(values) == 1 else values
    odd = values[~np.isfinite(values) | (values != np.round(values)) | (values < 0)]
    if values.ndim != 3 or odd.size:
        raise UsageError(
            "an atlas must be a 3-D label map of integers, 0 or more",
            where=path,
            found=f"the value {odd[0]:g}" if odd.size else f"{values.ndim} axes",
            do="save it as one 3-D volume in which each label is a whole number, and the background is 0",
        )
    table = _table(path.with_name(f"{name}_dseg.tsv"))
    numbers, array = np.unique(values.astype(np.int64), return_inverse=True)
    array = (array.reshape(values.shape) + (numbers[0] != 0)).astype(np.int32)
    present = [int(number) for number in numbers if number]
    if unnamed := [number for number in present if number not in table]:
        raise UsageError(
            "the atlas has labels that are not in its table",
            where=path,
            found=", ".join(map(str, unnamed[:8])) + " ..." * (len(unnamed) > 8),
            do="add rows for them to the .tsv",
        )
    if not present:
        raise UsageError(
            "the atlas has no label", where=path, found="every voxel is 0", do="give a map with labels, or remove it"
        )
    labels = _sided([table[number] for number in present], array, stored.grid, path)
    space, mismatch = _space(path, name, stored.grid)
    return LabelMap(name, str(path), digest, array, stored.grid, labels, space, mismatch)


def _table(path: Path) -> dict[int, Label]:
    try:
        text = read_bounded(path, _MAX_TABLE_BYTES).decode("utf-8-sig")
    except OSError as error:
        why = unreadable_reason(path, error)
        add = f"add the table of labels beside the map: {_TABLE}"
        raise UsageError(
            f"the table of an atlas {why.what}",
            where=path,
            found=why.found,
            do=add if isinstance(error, FileNotFoundError) and not why.found else why.do,
        ) from error
    except ValueError as error:  # not UTF-8, or too large
        raise UsageError(
            "the table of an atlas is not a text table",
            where=path,
            found=error_in_words(error),
            do=f"save it as {_TABLE}",
        ) from error
    table: dict[int, Label] = {}
    try:
        for row in csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE):
            label = _label(row)
            if label.index in table:
                raise ValueError(f"index {label.index} appears twice")
            table[label.index] = label
    except (KeyError, ValueError, AttributeError, TypeError, csv.Error) as error:
        raise UsageError(
            "the table of an atlas is not valid",
            where=path,
            found=f"line {len(table) + 2}: {f'no column {error}' if isinstance(error, KeyError) else error}",
            do=f"use {_TABLE} (left, right)",
        ) from error
    return table


def _label(row: Mapping[str, str]) -> Label:
    """Parse a table row. Raises KeyError, ValueError, AttributeError or TypeError if it is invalid."""
    side, group = ((row.get(column) or "").strip() for column in ("side", "group"))
    side = _SPELT.get(side.lower(), side.lower())
    label = Label(int(row["index"]), row["name"].strip(), "" if group.lower() == "n/a" else group, side)
    if not label.name or label.side not in ("", *_SIDES):
        raise ValueError("no name" if not label.name else f"side {row['side']!r} is not left or right")
    return label


def _sided(labels: Sequence[Label], array: AnyArray, grid: Grid, path: Path) -> tuple[Label, ...]:
    """Return the labels with the side on which each one lies.

    Raises UsageError if the map is not in MNI space, or its table has sides swapped.
    """
    index = np.argwhere(array)
    at = index[:: max(1, len(index) // 400_000)]
    points = grid.points_mm(at)
    atlas_template = shipped_template()
    inside = sample_nearest(atlas_template.hull, atlas_template.t1.grid, points).mean()
    if inside < _MIN_INSIDE:
        raise UsageError(
            "the atlas is not in MNI space",
            where=path,
            found=f"{inside:.0%} of the labelled voxels lie in the template's brain",
            do="resample it to MNI152 space, or correct its header",
        )
    number = array[tuple(at.T)]
    count = np.bincount(number, minlength=len(labels) + 1)[1:]
    left = np.bincount(number, points[:, 0] > 0, minlength=len(labels) + 1)[1:] / np.maximum(count, 1)
    middle = np.bincount(number, points[:, 0], minlength=len(labels) + 1)[1:] / np.maximum(count, 1)
    found, swapped = [], []
    for label, share, mm in zip(labels, left, middle, strict=True):
        lies = ""
        if abs(mm) >= _OFF_MIDLINE_MM:
            lies = "left" if share >= _ON_ONE_SIDE else "right" if share <= 1 - _ON_ONE_SIDE else ""
        if label.side and lies and lies != label.side:
            swapped.append(f"{label.index} {label.name} lies {lies}")
        found.append(Label(label.index, label.name, label.group, label.side or lies))
    if swapped:
        raise UsageError(
            "the sides in the table of an atlas contradict the positions of its labels",
            where=path,
            found="; ".join(swapped[:5]) + " ..." * (len(swapped) > 5),
            do="correct the column 'side', or the map's header if it is mirrored",
        )
    return tuple(found)


def _space(path: Path, name: str, grid: Grid) -> tuple[str, str]:
    """Return the space that a map declares and where it does, and a warning if it is not the template's."""
    entities = dict(part.split("-", 1) for part in name.split("_") if "-" in part)
    stated, by = entities.get("space") or entities.get("tpl") or "", "file name"
    sidecar = path.with_name(f"{name}_dseg.json")
    if not stated and sidecar.exists():
        try:
            content = read_json(sidecar)
            stated = str(next((content[key] for key in ("SpatialReference", "Space", "space") if key in content), ""))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                "the sidecar of an atlas can't be read",
                where=sidecar,
                found=error_in_words(error),
                do="correct or remove it",
            ) from error
        by = "sidecar"
    if not stated:
        stated, by = _by_header(path, grid), "header"
    if not stated:
        return "not stated", f"it states no space and is assumed to be in {SPACE}; positions may be off by several mm"
    told = escape_invisible(f"{stated} ({by})")
    return (
        told,
        ""
        if SPACE in stated
        else f"its space is {escape_invisible(stated)}, but the template's is {SPACE}: borders may be off by some mm",
    )


def _by_header(path: Path, grid: Grid) -> str:
    if grid.size in _FSL_SIZES:
        return f"MNI152 as FSL has it, by its {' x '.join(map(str, grid.size))} voxels"
    header = read_nifti_header(path)
    return {3: "Talairach, by its form code", 4: "MNI152, by its form code"}.get(
        0 if header is None else header.form, ""
    )


def sample_nearest(array: AnyArray, grid: Grid, points_mm: FloatArray) -> AnyArray:
    """Return the values of an array (z, y, x) at points (n, 3; LPS mm) by nearest neighbour; 0 outside."""
    index = np.rint(transform_points(np.linalg.inv(grid.affine), points_mm)).astype(np.int64)
    within = ((index >= 0) & (index < grid.size)).all(axis=1)
    found = np.zeros(len(points_mm), array.dtype)
    x, y, z = index[within].T
    found[within] = array[z, y, x]
    return found


@dataclass(frozen=True, eq=False)
class _Volumes:
    """The volume of one mask in each label (ml; index 0: in none)."""

    ml: FloatArray
    map: LabelMap

    def part(self, chosen: Sequence[int]) -> tuple[float, float]:
        """Return the volume (ml) in some labels, and of the whole lesion."""
        return float(sum(self.ml[n] for n in chosen)), float(self.ml.sum())

    def leading(self, word: Callable[[Label], str]) -> str:
        """Return the label attribute (its group, say) with the largest volume; empty if all are zero."""
        by_word: dict[str, float] = {}
        for n, label in self.map.numbered:
            by_word[word(label)] = by_word.get(word(label), 0.0) + float(self.ml[n])
        best = max(by_word, key=lambda name: by_word[name])
        return best if by_word[best] > 0 else ""


@dataclass(frozen=True, eq=False)
class _Asked:
    """A map's volumes for the mask, for each voter's mask, and for the mask at perturbed positions."""

    own: _Volumes
    members: Sequence[_Volumes]
    elsewhere: Sequence[_Volumes]

    def quantity(self, measure: Callable[[_Volumes], float]) -> UncertainQuantity:
        return UncertainQuantity.of(
            measure(self.own), [measure(one) for one in self.members], [measure(one) for one in self.elsewhere]
        )

    def amount(self, name: str, chosen: Sequence[int]) -> StructureVolume:
        members, elsewhere = ([one.part(chosen) for one in some] for some in (self.members, self.elsewhere))
        return StructureVolume.of(name, self.own.part(chosen), members, elsewhere)

    def choice(self, word: Callable[[Label], str]) -> UncertainCategory | None:
        own = self.own.leading(word)
        if not own:
            return None
        members, elsewhere = ([one.leading(word) for one in some] for some in (self.members, self.elsewhere))
        return UncertainCategory.of(own, filter(None, members), filter(None, elsewhere))


def measure_in_label_map(
    one: LabelMap,
    own: LesionVoxels,
    few: LesionVoxels,
    members: Sequence[LesionVoxels],
    matrix: FloatArray,
    nearby: Sequence[FloatArray],
) -> AtlasFindings:
    """Measure how much of the lesions lies in each label and group of a label map.

    Args:
        one: the label map.
        own: all lesion voxels of the mask.
        few: a subset of them, for the perturbed transforms.
        members: the lesion voxels of each voter's mask.
        matrix: 4x4 transform from the image to the template (LPS, mm).
        nearby: perturbed versions of it.
    """

    def volumes(sample: LesionVoxels, through: FloatArray) -> _Volumes:
        numbers = sample_nearest(one.array, one.grid, transform_points(through, sample.points_mm))
        return _Volumes(np.bincount(numbers, sample.ml, minlength=len(one.labels) + 1).astype(float), one)

    asked = _Asked(
        volumes(own, matrix),
        [volumes(member, matrix) for member in members],
        [volumes(few, other) for other in nearby],
    )
    groups = list(dict.fromkeys(label.group for label in one.labels if label.group))
    return AtlasFindings(
        one.name,
        one.file,
        one.sha256,
        one.space,
        one.mismatch,
        labels=_touched(asked.amount(label.name, [n]) for n, label in one.numbered),
        groups=_touched(asked.amount(group, one.chosen(group)) for group in groups),
        sided_groups=_touched(
            asked.amount(f"{group} {side}", one.chosen(group, side)) for group in groups for side in _SIDES
        ),
        outside=asked.quantity(lambda found: float(found.ml[0])),
        leading=asked.choice(lambda label: label.group or label.name),
        leading_side=asked.choice(lambda label: label.side),
        aspects=_aspects(asked, matrix) if one.is_aspects else None,
    )


def _touched(amounts: Iterable[StructureVolume]) -> tuple[StructureVolume, ...]:
    """Return the labels that contain some lesion, or might; largest volume first."""
    kept = [one for one in amounts if one.ml.members[1] > 0 or (one.ml.placement or (0, 0))[1] > 0]
    return tuple(sorted(kept, key=lambda one: -one.ml.value))


def _aspects(asked: _Asked, matrix: FloatArray) -> AspectsFindings:
    """Return the lesion share of each region, and for each side with ten regions 10 minus the number above `ASPECTS_SHARE`."""
    one = asked.own.map
    voxels = np.bincount(one.array.ravel(), minlength=len(one.labels) + 1)
    in_image = one.grid.voxel_ml / abs(
        float(np.linalg.det(matrix[:3, :3]))
    )  # ml of the image that a voxel of the map holds

    def share(of: _Volumes, number: int) -> float:
        return min(1.0, float(of.ml[number]) / (voxels[number] * in_image))

    regions: list[RegionShare] = []
    scores = []
    for side in _SIDES:
        numbers = [n for n, label in one.numbered if label.side == side]
        regions += [RegionShare(one.labels[n - 1].name, asked.quantity(partial(share, number=n))) for n in numbers]
        if len(numbers) == _ASPECTS_REGIONS:
            affected = tuple(one.labels[n - 1].name for n in numbers if share(asked.own, n) > ASPECTS_SHARE)
            scores.append(AspectsScore(side, asked.quantity(partial(_score, numbers=numbers, share=share)), affected))
    return AspectsFindings(ASPECTS_SHARE, tuple(regions), tuple(scores))


def _score(of: _Volumes, numbers: Sequence[int], share: Callable[[_Volumes, int], float]) -> float:
    return float(_ASPECTS_REGIONS - sum(share(of, number) > ASPECTS_SHARE for number in numbers))
