"""Pool the features of each encoder stage over the whole brain, over lesions, and over windows without a lesion."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from ensemble.errors import WeightsBroken
from ensemble.families.base import EncodingMember, InferenceSettings
from ensemble.families.spec import MemberSpec
from ensemble.geometry import Triple
from ensemble.members.manifest import open_member
from ensemble.metrics import lesion_components
from ensemble.prepare.case import PreparedCase
from ensemble.types import AnyArray, BoolArray, FloatArray

log = logging.getLogger(__name__)

#: Side (mm) of a window with or without a lesion: about four diameters of a lesion of 0.1 ml.
WINDOW_MM = 20.0
#: Most windows of either kind in a case, so that a case with a hundred emboli does not dominate; and fewest windows without a lesion.
MOST_WINDOWS, FEWEST_WITHOUT = 8, 3
#: Share of a window without a lesion that must be brain.
_BRAIN_SHARE = 0.6


class RegionKind(Enum):
    """The kind of region. Values are stored in the cached embeddings."""

    BRAIN = "brain"
    """The whole brain."""
    LESION = "lesion"
    """A window centred on a lesion (26-connected component)."""
    WITHOUT_LESION = "without"
    """A window of the same size without any lesion."""
    SMALL_DISPUTED = "speck"
    """A window centred on a small component of the fused mask on which the members disagree."""


@dataclass(frozen=True)
class EmbeddedRegion:
    """A region of one case whose features are pooled into one vector."""

    kind: RegionKind
    ml: float
    """Volume of the brain or of the lesion; 0 for a window without one."""
    centre_zyx: tuple[int, int, int] = (0, 0, 0)
    """Centre of the window, as a voxel index of the DWI."""
    true: bool = True
    """For a small disputed component: whether it overlaps a lesion of the reference mask."""


@dataclass(frozen=True)
class CaseEmbeddings:
    """The feature vectors of one case's regions, for each stage of each encoder."""

    name: str
    regions: tuple[EmbeddedRegion, ...]
    stages: Mapping[str, tuple[FloatArray, ...]]
    """By member: features (regions, D) of each stage, first to last."""

    def save(self, path: Path) -> None:
        """Write a .npz file atomically."""
        content: dict[str, AnyArray] = {
            "kind": np.array([region.kind.value for region in self.regions]),
            "ml": np.array([region.ml for region in self.regions]),
            "centre": np.array([region.centre_zyx for region in self.regions]),
            "true": np.array([region.true for region in self.regions]),
        }
        for member, stages in self.stages.items():
            content |= {f"stage/{member}/{number}": features for number, features in enumerate(stages)}
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            np.savez(file, **content)  # type: ignore[arg-type]  # names of arrays
        part.rename(path)

    @classmethod
    def read(cls, path: Path) -> CaseEmbeddings:
        """Read a file written by `save`."""
        with np.load(path) as content:
            columns = zip(content["kind"], content["ml"], content["centre"].tolist(), content["true"], strict=True)
            regions = tuple(
                EmbeddedRegion(RegionKind(kind), float(ml), _place(at), bool(true)) for kind, ml, at, true in columns
            )
            members = dict.fromkeys(name.split("/")[1] for name in content.files if name.startswith("stage/"))
            stages = {
                member: tuple(
                    content[f"stage/{member}/{number}"]
                    for number in range(sum(name.startswith(f"stage/{member}/") for name in content.files))
                )
                for member in members
            }
        return cls(path.stem, regions, stages)


def open_encoders(specs: Sequence[MemberSpec], device: str) -> list[EncodingMember]:
    """Load the members that expose encoder features; the log names the others. Raises WeightsBroken if there is none."""
    settings = InferenceSettings(device, tta="none", precision="fp32", session="torch", features=True)
    found = []
    for spec in specs:
        member = open_member(spec, settings)
        if isinstance(member, EncodingMember):
            found.append(member)
        else:
            log.info("note: %s (%s) does not expose the features of its encoder", spec.name, spec.kind)
    if not found:
        names = ", ".join(f"{spec.name} ({spec.kind})" for spec in specs)
        raise WeightsBroken(
            "no member exposes the features of its encoder",
            found=names,
            do="give members of nnU-Net v2 (--weights)",
        )
    return found


def embed(case: PreparedCase, regions: Sequence[EmbeddedRegion], encoders: Sequence[EncodingMember]) -> CaseEmbeddings:
    """Return the features of a case's regions from every encoder whose required images the case has. Raises what encoders raise."""
    able = [encoder for encoder in encoders if not encoder.requires - case.modalities]
    shares = np.stack([_share(case, region) for region in regions]).astype(np.float32)
    return CaseEmbeddings(case.name, tuple(regions), {encoder.name: encoder.encode(case, shares) for encoder in able})


def select_regions(case: PreparedCase, lesion: BoolArray) -> list[EmbeddedRegion]:
    """Return the regions whose embeddings are compared: the whole brain, windows around lesions, and as many windows without one.

    `lesion` is a mask (bool; z, y, x). The same case with the same name gives the same regions.
    """
    brain = case.brain.array
    labels, count = lesion_components(lesion)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    found = [EmbeddedRegion(RegionKind.BRAIN, float(brain.sum()) * case.grid.voxel_ml)]
    # evenly over the sizes, so that large ones do not crowd out small ones
    order = np.argsort(-sizes, kind="stable")
    chosen = (
        order[np.unique(np.linspace(0, max(0, count - 1), min(count, MOST_WINDOWS)).round().astype(int))]
        if count
        else []
    )
    for number in chosen:
        found.append(window_around(labels == number + 1, RegionKind.LESION, case.grid.voxel_ml))
    draw = np.random.default_rng(zlib.crc32(case.name.encode()))
    wanted = max(FEWEST_WITHOUT, len(found) - 1)
    for at in draw.permutation(np.argwhere(brain))[: 50 * wanted]:
        box = _box(tuple(at), brain.shape, case.grid.spacing_zyx_mm)
        if not lesion[box].any() and brain[box].mean() >= _BRAIN_SHARE:
            found.append(EmbeddedRegion(RegionKind.WITHOUT_LESION, 0.0, _place(at)))
            wanted -= 1
        if wanted == 0:
            break
    return found


def window_around(component: BoolArray, kind: RegionKind, voxel_ml: float, *, true: bool = True) -> EmbeddedRegion:
    """Return the window centred on a component (bool; z, y, x)."""
    centre = np.argwhere(component).mean(axis=0).round().astype(int)
    return EmbeddedRegion(kind, float(component.sum()) * voxel_ml, _place(centre), true)


def _place(voxel: AnyArray) -> tuple[int, int, int]:
    z, y, x = map(int, voxel)
    return z, y, x


def _share(case: PreparedCase, region: EmbeddedRegion) -> BoolArray:
    """The region's voxels (z, y, x)."""
    brain = case.brain.array
    if region.kind is RegionKind.BRAIN:
        return brain
    share = np.zeros_like(brain)
    share[_box(region.centre_zyx, brain.shape, case.grid.spacing_zyx_mm)] = True
    return share


def _box(centre: tuple[int, ...], shape: tuple[int, ...], spacing_mm: Triple) -> tuple[slice, ...]:
    """The window's voxels, within the image."""
    half = [max(0, round(WINDOW_MM / mm / 2 - 0.5)) for mm in spacing_mm]
    return tuple(slice(max(0, at - h), min(n, at + h + 1)) for at, h, n in zip(centre, half, shape, strict=True))
