"""Sort the frames of one series into volumes on a grid, and check that no slice is missing or surplus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from ensemble.errors import InputRefused
from ensemble.geometry import MAX_SKEW, Grid
from ensemble.readers.b_values import SAME_SHELL
from ensemble.readers.dicom.frames import AGAIN, CONVERT, Frame, SlicePlane
from ensemble.readers.dicom.series import SAME_COSINE, Series, same_slice_geometry
from ensemble.readers.geometry_checks import MAX_VOXELS
from ensemble.types import FloatArray

#: How far slices may lie from even spacing, as a share of it, and from the line at right angles to the first one, in mm; of a high
#: stack `MAX_SKEW` of its height, since cosines of three digits do not tell that line more exactly.
_UNEVEN, _ASIDE_MM = 0.02, 0.1
#: Slices closer than this along the stack have the same position, since volumes store it with few digits.
_SAME_PLACE_MM = 0.05
#: How far echo times of one acquisition may differ, as a share.
_SAME_ECHO = 0.05


@dataclass(frozen=True, eq=False)
class Stack:
    """A DICOM series with its slices sorted into volumes."""

    volumes: tuple[tuple[Frame, ...], ...]
    """By volume, then by place from the grid's first slice to its last."""
    b_values: tuple[float, ...] | None
    """b-value of each volume, in s/mm^2; None if the series states none."""
    made: tuple[int, ...]
    """Of each volume, see `Frame.made`."""
    grid: Grid
    notes: tuple[str, ...] = ()

    def without(self, numbers: Sequence[int]) -> Stack:
        """Return the stack without some volumes."""
        kept = [number for number in range(len(self.volumes)) if number not in numbers]
        b_values = None if self.b_values is None else tuple(self.b_values[number] for number in kept)
        volumes = tuple(self.volumes[number] for number in kept)
        made = tuple(self.made[number] for number in kept)
        return replace(self, volumes=volumes, made=made, b_values=b_values)


def build_stack(series: Series, path: Path, label: str, place_of: Callable[[Path], str]) -> Stack:
    """Sort the frames of a series. `place_of` gives the path of a file as the user knows it.

    Raises InputRefused when a file is damaged or not read, or slices are mixed, missing, surplus or not stacked at right angles.
    """

    def refuse(what: str, found: str, do: str = "export it again, with all its slices") -> InputRefused:
        return InputRefused(f"the {label} series {what}", where=path, found=found, do=do)

    _refuse_problems(series, label, place_of)
    frames, notes = _with_b(series)
    _refuse_mixed(frames, refuse)
    first, plane = frames[0], plane_of(frames[0])
    across, down = np.reshape(plane.orientation, (2, 3))
    normal = np.cross(across, down)
    normal /= np.linalg.norm(normal)
    places = _places(frames, normal)
    if len(places) < 2:
        raise refuse("is a single slice", f"{len(frames)} images at one position")
    _refuse_uneven(places, refuse)
    _refuse_apart(places, refuse)
    _refuse_echoes(series, frames, refuse)
    positions = np.array([plane_of(place[0]).position for place in places])
    spacing = _slice_spacing(positions, normal, refuse)
    if len(frames) * first.size[0] * first.size[1] > MAX_VOXELS:
        raise refuse(
            "is too large to be a brain scan",
            f"{len(frames)} images of {first.size[0]} x {first.size[1]}; at most {MAX_VOXELS / 1e6:g} million voxels are allowed",
            "give only the series of the brain",
        )
    volumes = tuple(zip(*places, strict=True))
    grid = Grid(
        (first.size[0], first.size[1], len(places)),
        (plane.spacing[1], plane.spacing[0], spacing),
        (float(positions[0][0]), float(positions[0][1]), float(positions[0][2])),
        tuple(np.column_stack([across, down, normal]).ravel().tolist()),
    )
    told = len([frame for frame in frames if frame.b is not None])
    if 0 < told < len(frames):
        raise refuse("has b-values for only some of its images", f"{told} of {len(frames)}", CONVERT)
    if not told and not _is_in_order(places):
        numbers = "their instance numbers are sorted neither by volume nor by slice"
        raise refuse("does not say which of its images form a volume", f"{len(volumes)} volumes; {numbers}", CONVERT)
    b_values = (
        tuple(float(np.median([frame.b for frame in volume if frame.b is not None])) for volume in volumes)
        if told
        else None
    )
    if series.copies:
        notes.append(f"{len(series.copies)} copies of images (same SOP instance) were ignored")
    return Stack(volumes, b_values, tuple(volume[0].made for volume in volumes), grid, tuple(notes))


def refuse_unreadable_frame(frame: Frame, label: str, place_of: Callable[[Path], str]) -> None:
    """Raise InputRefused if the file of a frame can't be read."""
    if (problem := frame.instance.problem) is not None:
        what, where = f"a file of the {label} series {problem.what}", place_of(frame.instance.path)
        raise InputRefused(what, where=where, found=problem.found, do=problem.do)


def _refuse_problems(series: Series, label: str, place_of: Callable[[Path], str]) -> None:
    for frame in series.frames:
        refuse_unreadable_frame(frame, label, place_of)
    if (lost := next((frame for frame in series.frames if frame.plane is None), None)) is not None:
        raise InputRefused(
            f"a file of the {label} series has no valid slice position",
            where=place_of(lost.instance.path),
            found="position, orientation or pixel spacing is missing or invalid",
            do=CONVERT if len(series.frames) > 1 else AGAIN,
        )


def _with_b(series: Series) -> tuple[list[Frame], list[str]]:
    """Return the frames with the b-values that matter: none for a map.

    0 where others of the series have one, as scanners leave out that of b0.

    Derived images among acquired ones may lack it for other reasons: theirs stays unknown.
    """
    if not series.told_b:
        return [replace(frame, b=None) for frame in series.frames], []
    lacking = [frame for frame in series.frames if frame.b is None]
    derived = any("DERIVED" in frame.image_type for frame in lacking)
    acquired = any("ORIGINAL" in frame.image_type for frame in series.frames if frame.b is not None)
    if not lacking or (derived and acquired):
        return list(series.frames), []
    note = f"{len(lacking)} of {len(series.frames)} images of the series have no b-value: taken as b = 0"
    return [replace(frame, b=0.0) if frame.b is None else frame for frame in series.frames], [note]


def _refuse_mixed(frames: Sequence[Frame], refuse: Callable[..., InputRefused]) -> None:
    first = frames[0]
    odd = next((frame for frame in frames if not same_slice_geometry(frame, first)), None)
    if odd is None:
        return
    said = [(frame.size, plane_of(frame).orientation, plane_of(frame).spacing) for frame in (first, odd)]
    for name, tolerance, one, other in zip(("size", "orientation", "spacing"), (0, SAME_COSINE, 0), *said, strict=True):
        if max(abs(a - b) for a, b in zip(one, other, strict=True)) > tolerance:
            found = "; ".join(str(tuple(round(number, 4) for number in values)) for values in (one, other))
            raise refuse(f"mixes slices of different {name}", found)


def plane_of(frame: Frame) -> SlicePlane:
    """Return position, orientation and spacing of a frame that is known to have them."""
    assert frame.plane is not None
    return frame.plane


def _places(frames: Sequence[Frame], normal: FloatArray) -> list[list[Frame]]:
    """Return the frames grouped by slice position, each group sorted by derivation, b-value and acquisition."""
    along = np.array([plane_of(frame).position for frame in frames]) @ normal
    order = np.argsort(along, kind="stable")
    places: list[list[Frame]] = []
    begin = -np.inf
    for number in order:
        if along[number] - begin > _SAME_PLACE_MM:
            places.append([])
            begin = along[number]
        places[-1].append(frames[number])
    return [sorted(place, key=_within_place) for place in places]


def _within_place(frame: Frame) -> tuple[object, ...]:
    return frame.made, frame.b is None, frame.b or 0.0, frame.order


def _refuse_uneven(places: Sequence[Sequence[Frame]], refuse: Callable[..., InputRefused]) -> None:
    """Raise InputRefused unless every slice position has the same number, b-values and derivations of images."""
    counts = sorted({len(place) for place in places})
    shells = [[(frame.b, frame.made) for frame in place] for place in places]
    even = len(counts) == 1 and all(_alike(shell, shells[0]) for shell in shells)
    if not even:
        raise refuse(
            "lacks slices", f"{' or '.join(map(str, counts))} images per slice position, or different b-values"
        )


def _alike(place: Sequence[tuple[float | None, int]], other: Sequence[tuple[float | None, int]]) -> bool:
    for (b, made), (other_b, other_made) in zip(place, other, strict=True):
        if made != other_made or (b is None) != (other_b is None):
            return False
        if b is not None and other_b is not None and abs(b - other_b) > SAME_SHELL:
            return False
    return True


def _refuse_apart(places: Sequence[Sequence[Frame]], refuse: Callable[..., InputRefused]) -> None:
    """Raise the error that `refuse` makes if the images at one slice position do not coincide."""
    apart = max(float(np.ptp([plane_of(frame).position for frame in place], axis=0).max()) for place in places)
    if apart > _ASIDE_MM:
        raise refuse("has volumes that are shifted against each other", f"up to {apart:.1f} mm", CONVERT)


def _refuse_echoes(series: Series, frames: Sequence[Frame], refuse: Callable[..., InputRefused]) -> None:
    """Raise the error that `refuse` makes if images to be averaged (one b-value) have several echo times."""
    b = series.usable_b
    shell = [frame for frame in frames if b is None or (frame.b is not None and abs(frame.b - b) <= SAME_SHELL)]
    echoes = sorted({frame.echo_ms for frame in shell if frame.echo_ms})
    if echoes and echoes[-1] > echoes[0] * (1 + _SAME_ECHO):
        raise refuse("mixes echo times", f"{echoes[0]:g} to {echoes[-1]:g} ms", "give only the images of one echo time")


def _is_in_order(places: Sequence[Sequence[Frame]]) -> bool:
    """Return whether the acquisition order separates volumes with certainty, volume by volume or slice by slice."""
    orders = [[frame.order for frame in place] for place in places]
    if any(len(set(order)) < len(order) for order in orders):
        return False
    return any(
        all(max(one) < min(other) for one, other in pairwise(sorted(blocks)))
        for blocks in ([list(volume) for volume in zip(*orders, strict=True)], orders)
    )


def _slice_spacing(positions: FloatArray, normal: FloatArray, refuse: Callable[..., InputRefused]) -> float:
    """Return the slice spacing (mm). Raises the error that `refuse` makes if a slice is missing or the stack is sheared."""
    along = positions @ normal
    gaps = np.diff(along)
    spacing = float((along[-1] - along[0]) / (len(along) - 1))
    if np.abs(gaps - spacing).max() > max(_UNEVEN * spacing, 0.02):
        raise refuse(
            "lacks slices", f"distances of {gaps.min():.2f} to {gaps.max():.2f} mm between {len(along)} slices"
        )
    aside = positions - positions[0] - np.outer(along - along[0], normal)
    if np.abs(aside).max() > max(_ASIDE_MM, MAX_SKEW * float(along[-1] - along[0])):
        raise refuse(
            "is sheared: its slices are not stacked at right angles", f"up to {np.abs(aside).max():.1f} mm aside"
        )
    return spacing
