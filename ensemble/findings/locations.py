"""Locations of lesions by the built-in atlas: sides, regions and structures, and how they change if the registration is a little off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ensemble.findings.template import AtlasStructure, Template
from ensemble.findings.types import LesionLocations, StructureVolume, UncertainCategory
from ensemble.geometry import Grid
from ensemble.metrics import lesion_components
from ensemble.types import AnyArray, FloatArray

#: Structures that can contain a lesion: tissue only, without CSF.
TISSUE = (
    AtlasStructure.CORTEX,
    AtlasStructure.WHITE_MATTER,
    AtlasStructure.DEEP_GREY,
    AtlasStructure.CEREBELLUM,
    AtlasStructure.BRAIN_STEM,
)
REGIONS: dict[str, tuple[AtlasStructure, ...]] = {
    "cerebrum": (AtlasStructure.CORTEX, AtlasStructure.WHITE_MATTER, AtlasStructure.DEEP_GREY),
    "cerebellum": (AtlasStructure.CEREBELLUM,),
    "brain stem": (AtlasStructure.BRAIN_STEM,),
}
#: A lesion is on both sides where the lesser one holds at least this share of it.
BOTH_SIDES = 0.25
#: A patient has lesions on both sides where those of the lesser one make at least this share of the volume.
BOTH_SIDES_OF_ALL = 0.05
#: Assumed error of an affine registration: shift along an axis, rotation about one, and scale (docs/adr/0024 has the measurement).
SHIFT_MM, TURN_DEGREES, SCALING = 6.0, 4.0, 0.04
#: Text for a lesion that lies completely outside the tissue of the atlas.
UNKNOWN = "unknown"
#: Most voxels of a lesion that are looked up in the perturbed registrations.
_MAX_VOXELS = 3000
#: Voxels at which the atlas probabilities sum to less than this are outside its tissue.
_MIN_PROBABILITY = 1e-3


def registration_perturbations(centre_mm: FloatArray) -> list[FloatArray]:
    """Return 4x4 transforms (LPS, mm), each a small registration error: a shift, rotation or scaling about a point of the template."""
    maps: list[FloatArray] = []
    for axis in range(3):
        for sign in (-1.0, 1.0):
            shift = np.eye(4)
            shift[axis, 3] = sign * SHIFT_MM
            maps.append(shift)
            turn = np.eye(4)
            one, other = [k for k in range(3) if k != axis]
            angle = sign * math.radians(TURN_DEGREES)
            turn[one, one] = turn[other, other] = math.cos(angle)
            turn[one, other], turn[other, one] = -math.sin(angle), math.sin(angle)
            maps.append(_about(turn, centre_mm))
    for factor in (1 - SCALING, 1 + SCALING):
        maps.append(_about(np.diag([factor, factor, factor, 1.0]), centre_mm))
    return maps


def _about(matrix: FloatArray, centre_mm: FloatArray) -> FloatArray:
    there, back = np.eye(4), np.eye(4)
    there[:3, 3], back[:3, 3] = centre_mm, -centre_mm
    return np.asarray(there @ matrix @ back)


def transform_points(matrix: FloatArray, points_mm: FloatArray) -> FloatArray:
    """Apply a 4x4 transform to points (..., 3)."""
    return points_mm @ matrix[:3, :3].T + matrix[:3, 3]


def structure_probabilities(atlas_template: Template, points_mm: FloatArray) -> FloatArray:
    """Return the probability of each side and structure (2, structures of TISSUE, n) at template points (n, 3; LPS mm).

    They sum to 1 at each point in the tissue of the atlas, and are 0 elsewhere. Side 0 is left.
    """
    origin, spacing = np.array(atlas_template.t1.grid.origin_mm), np.array(atlas_template.t1.grid.spacing_mm)
    found = np.empty((2, len(TISSUE), len(points_mm)), np.float32)
    for number, mirror in enumerate((1.0, -1.0)):
        index = ((points_mm * (mirror, 1.0, 1.0) - origin) / spacing).T[::-1]
        for kind in TISSUE:
            found[number, kind] = ndimage.map_coordinates(atlas_template.left[kind], index, order=1, cval=0.0)
    total = found.sum(axis=(0, 1))
    return np.divide(found, total, out=np.zeros_like(found), where=total > _MIN_PROBABILITY)


def lesion_side(left: float, right: float, least: float) -> str:
    """Return left, right or both, from the volumes on each side; both if the smaller is at least the share `least`; unknown without any."""
    if left + right <= 0:
        return UNKNOWN
    lesser = min(left, right)
    if lesser > 0 and lesser >= least * (left + right):
        return "both"
    return "left" if left >= right else "right"


@dataclass(frozen=True)
class LesionVolumes:
    """Volumes (ml) of the lesions of one mask, by side and structure."""

    by_lesion: FloatArray
    """ml (lesion, side, structure)."""

    @property
    def total(self) -> FloatArray:
        """Return the volume (ml) by side and structure."""
        return np.asarray(self.by_lesion.sum(axis=0))

    def sides(self) -> list[str]:
        """Return the side of each lesion."""
        return [lesion_side(float(left), float(right), BOTH_SIDES) for left, right in self.by_lesion.sum(axis=2)]

    def side(self) -> str:
        """Return the side of all lesions together. Each lesion counts wholly for its own side: blur at the midline adds no second one."""
        left = right = 0.0
        for lesion, side in zip(self.by_lesion, self.sides(), strict=True):
            left_ml, right_ml = lesion.sum(axis=1)
            left += left_ml if side == "both" else lesion.sum() * (side == "left")
            right += right_ml if side == "both" else lesion.sum() * (side == "right")
        return lesion_side(left, right, BOTH_SIDES_OF_ALL)

    def regions(self) -> list[str]:
        """Return for each lesion the region with most of its volume."""
        return [
            max(REGIONS, key=lambda name: lesion[:, list(REGIONS[name])].sum()) if lesion.any() else UNKNOWN
            for lesion in self.by_lesion
        ]

    def structures(self) -> list[str]:
        """Return for each lesion the structure with most of its volume."""
        return [
            TISSUE[int(lesion.sum(axis=0).argmax())].label if lesion.any() else UNKNOWN for lesion in self.by_lesion
        ]


@dataclass(frozen=True, eq=False)
class LesionVoxels:
    """The lesion voxels of a mask, largest lesion first."""

    points_mm: FloatArray
    """(n, 3), LPS, in the image's world."""
    ml: FloatArray
    """(n): volume that each stands for, in ml."""
    lesion_of: AnyArray
    """(n): number of its lesion, from 0 up."""

    @classmethod
    def of(cls, mask: AnyArray, grid: Grid) -> LesionVoxels:
        """Take all voxels of a mask (z, y, x)."""
        labels, count = lesion_components(mask)
        index = np.argwhere(labels)
        number = labels[tuple(index.T)]
        largest_first = np.argsort(-np.bincount(number, minlength=count + 1)[1:], kind="stable")
        rank = np.empty(count + 1, np.int64)
        rank[largest_first + 1] = np.arange(count)
        return cls(grid.points_mm(index), np.full(len(index), grid.voxel_ml), rank[number])

    @property
    def volumes_ml(self) -> FloatArray:
        """Volume of each lesion."""
        return np.asarray(np.bincount(self.lesion_of, self.ml) if len(self.ml) else np.zeros(0))

    @property
    def centres_mm(self) -> FloatArray:
        """Centre of each lesion (lesion, 3), LPS."""
        parts = [np.bincount(self.lesion_of, self.points_mm[:, axis]) for axis in range(3)]
        return np.stack(parts, axis=1) / np.maximum(np.bincount(self.lesion_of), 1)[:, None]

    def thinned(self) -> LesionVoxels:
        """Return at most about `_MAX_VOXELS` voxels per lesion, each with a larger weight, for repeated evaluation."""
        count = np.bincount(self.lesion_of) if len(self.ml) else np.zeros(0, np.int64)
        if not (count > _MAX_VOXELS).any():
            return self
        order = np.argsort(self.lesion_of, kind="stable")
        step = -(-count // _MAX_VOXELS)
        within = np.concatenate([np.arange(n) for n in count])  # of each voxel in its lesion, in order
        kept = order[within % step[self.lesion_of[order]] == 0]
        factor = count / np.bincount(self.lesion_of[kept], minlength=len(count))
        return LesionVoxels(self.points_mm[kept], self.ml[kept] * factor[self.lesion_of[kept]], self.lesion_of[kept])


def measure_lesion_volumes(atlas_template: Template, voxels: LesionVoxels, matrix: FloatArray) -> LesionVolumes:
    """Return the volume (ml) of each lesion on each side and in each structure, weighted by the atlas's probabilities.

    `matrix` (4x4; LPS, mm) maps points of the image to points of the template.
    """
    return sum_lesion_volumes(
        voxels, structure_probabilities(atlas_template, transform_points(matrix, voxels.points_mm))
    )


def sum_lesion_volumes(voxels: LesionVoxels, chances: FloatArray) -> LesionVolumes:
    """Return the lesion volumes (ml), given the probability (side, structure of TISSUE, n) at each of the n lesion voxels."""
    count = int(voxels.lesion_of.max()) + 1 if len(voxels.lesion_of) else 0
    volumes = np.zeros((count, 2, len(TISSUE)))
    for side in range(2):
        for kind in range(len(TISSUE)):
            volumes[:, side, kind] = np.bincount(voxels.lesion_of, voxels.ml * chances[side, kind], minlength=count)
    return LesionVolumes(volumes)


def summarise_locations(
    own: LesionVolumes, members: Sequence[LesionVolumes], elsewhere: Sequence[LesionVolumes]
) -> LesionLocations:
    """Summarise the locations of all lesions: for the mask, for each voter's mask, and for perturbed registrations."""
    if not len(own.by_lesion):
        return LesionLocations(None, (), (), ())
    found = (own.total, [other.total for other in members], [other.total for other in elsewhere])
    side = UncertainCategory.of(
        own.side(), [m.side() for m in members if len(m.by_lesion)], [e.side() for e in elsewhere]
    )
    everything = tuple(range(len(TISSUE)))
    return LesionLocations(
        side,
        tuple(_amount(name, found, (number,), everything) for number, name in enumerate(("left", "right"))),
        tuple(_amount(name, found, (0, 1), tuple(kinds)) for name, kinds in REGIONS.items()),
        tuple(_amount(kind.label, found, (0, 1), (int(kind),)) for kind in TISSUE),
    )


def _amount(
    name: str,
    found: tuple[FloatArray, Sequence[FloatArray], Sequence[FloatArray]],
    sides: Sequence[int],
    kinds: Sequence[int],
) -> StructureVolume:
    """Return the volume on some sides in some structures, with its range over voters and perturbations."""
    own, members, elsewhere = found

    def part(total: FloatArray) -> tuple[float, float]:
        return float(total[np.ix_(list(sides), list(kinds))].sum()), float(total.sum())

    return StructureVolume.of(name, part(own), [part(m) for m in members], [part(e) for e in elsewhere])
