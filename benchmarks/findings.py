"""Are the findings right? Side, region and structure of simulated lesions in heads that the atlas under test has not seen.

    python -m benchmarks.findings [--shared ../shared] [--heads 40] [--hard 3] | --real

Each of the 20 label maps is posed, deformed and scanned as `training.simulate` does, then turned in its header and cropped; its true
structures go where its signal goes. The atlas under test is made of the label maps of the other four folds. Then heads of which half is
missing, and heads whose header turns or mirrors them: all must be told. `--real` shows the public cases with the arterial atlas of
`shared/atlases`: for reading beside their pictures, nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F

from ensemble.config import RunConfig
from ensemble.findings.find import compute_findings, register_case_to_template
from ensemble.findings.locations import (
    TISSUE,
    LesionVolumes,
    LesionVoxels,
    sum_lesion_volumes,
    summarise_locations,
    transform_points,
)
from ensemble.findings.maps import LabelMap, read_label_map
from ensemble.findings.template import AtlasStructure, Template, shipped_template
from ensemble.findings.types import Findings
from ensemble.fusion import FusedPrediction
from ensemble.geometry import Grid
from ensemble.outputs.report.findings_text import describe_findings, format_share
from ensemble.pipeline import Result, load_from_config, segment_raw
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.progress import SilentWatcher
from ensemble.readers.base import RawCase, RawImage
from ensemble.types import AnyArray, BoolArray, FloatArray, Modality
from ensemble.volume import Volume
from training.acquisition import acquire, draw_spacing
from training.anatomy import HEADS, load_head, random_person, to_grid_sample
from training.draw import Draw
from training.evaluate import real_cases
from training.lesions import draw_damage, load_lesions
from training.simulate import SHARED, brighten_plexus, emphasise_tracts
from training.structures import OF_TISSUE, head_in_template, structures
from training.tissues import parameter_maps

FOLDS = 5
SEED = 240_000
#: Header's turn about each axis, and what is cut off below and above.
TURN_DEGREES, CUT_BELOW_MM, CUT_ABOVE_MM = 12.0, 25.0, 15.0
#: Lesions that are counted, in ml: for side and region, and for deep grey against the rest.
SIDE_ML, DEEP_ML = 0.1, 1.0
ALLOWED = 0.10  # error of a share


@dataclass(frozen=True)
class Head:
    """A simulated case, and the truth."""

    raw: RawCase
    lesion: BoolArray
    truth: FloatArray
    """(side, structure of TISSUE, z, y, x): shares of tissue in each voxel."""


def simulated(seed: int, index: int, shared: Path) -> Head:
    """A patient whose head is a posed, deformed, cropped label map."""
    draw = Draw(seed)
    head = load_head(shared, index)
    person = random_person(head, draw)
    maps = parameter_maps(person.classes, draw)
    emphasise_tracts(maps, person.tract, draw)
    brighten_plexus(maps, person.classes, draw)
    damage = draw_damage(person, load_lesions(shared).part(held_out=True), draw, lesion_free=False)
    case = acquire(
        person, maps, damage, draw_spacing(draw), draw, _true_shares(person.classes, person.source, shared, index)
    )
    assert case.carried is not None
    arrays = {Modality.DWI: case.dwi.numpy(), Modality.ADC: case.adc.numpy()}
    lesion, carried = case.lesion.numpy() > 0, case.carried.numpy()
    carried = carried / np.maximum(carried.sum(axis=0), 1e-6)
    kept = _kept(case.brain.numpy(), case.spacing_mm[0], draw)
    z, y, x = case.spacing_mm
    shape = arrays[Modality.DWI][kept].shape
    origin = (draw.uniform(-120, 120), draw.uniform(-120, 120), draw.uniform(-120, 120))
    grid = Grid((shape[2], shape[1], shape[0]), (x, y, z), origin, _turned(draw))
    name = f"head_{index:02d}_{seed}"
    images = {m: RawImage(Path(f"{name}_{m}"), Volume(array[kept], grid)) for m, array in arrays.items()}
    truth = carried[:, kept].reshape(2, len(TISSUE), *shape)
    return Head(RawCase(name, images), lesion[kept], truth)


def _true_shares(classes: torch.Tensor, source: torch.Tensor, shared: Path, index: int) -> torch.Tensor:
    """One map a side and structure (side x structure, z, y, x) on the person's grid."""
    kinds, left = structures(shared, index)
    at = to_grid_sample(source, kinds.shape)

    def here(labels: torch.Tensor) -> torch.Tensor:
        return F.grid_sample(labels[None, None].float(), at, mode="nearest", align_corners=True)[0, 0].round().long()

    kind, is_left, before = here(kinds), here(left) > 0, here(load_head(shared, index).classes)
    for tissue, structure in OF_TISSUE.items():
        kind = torch.where((classes != before) & (classes == tissue), int(structure), kind)
    return torch.stack(
        [(kind == int(k)) & (is_left if side == 0 else ~is_left) for side in range(2) for k in TISSUE]
    ).float()


def _kept(brain: BoolArray, mm: float, draw: Draw) -> slice:
    """The slices that are scanned."""
    low, high = np.flatnonzero(brain.any(axis=(1, 2)))[[0, -1]]
    below, above = draw.uniform(0, CUT_BELOW_MM), draw.uniform(0, CUT_ABOVE_MM)
    first, last = (low + round(below / mm)) if draw.chance(0.4) else 0, len(brain)
    if draw.chance(0.4):
        last = high + 1 - round(above / mm)
    return slice(int(first), int(last))


def _turned(draw: Draw) -> tuple[float, ...]:
    """Direction cosines of an array with z up, y to anterior and x to the left, turned a little about each axis."""
    matrix = np.diag([1.0, -1.0, 1.0])
    for axis in range(3):
        angle = math.radians(draw.uniform(-TURN_DEGREES, TURN_DEGREES))
        one, other = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[one, one] = turn[other, other] = math.cos(angle)
        turn[one, other], turn[other, one] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return tuple(matrix.ravel().tolist())


def result_of(case: PreparedCase, lesion: AnyArray) -> Result:
    """As if one member had found just this mask."""
    like = case.tissue_normalized[Modality.DWI].like
    fused = FusedPrediction(
        like(lesion > 0), like(lesion.astype(np.float32)), like(lesion.astype(np.uint8)), ("truth",)
    )
    return Result(case, (), fused, 0.0, 0)


def true_tally(head: Head, grid: Grid) -> LesionVolumes:
    """Volumes by lesion, side and structure, in the order of the findings."""
    own = LesionVoxels.of(head.lesion, grid)
    index = np.rint(transform_points(np.linalg.inv(grid.affine), own.points_mm)).astype(int)
    chances = head.truth[:, :, index[:, 2], index[:, 1], index[:, 0]]
    return sum_lesion_volumes(own, chances / np.maximum(chances.sum(axis=(0, 1)), 1e-6))


def atlases(shared: Path) -> list[Template]:
    """For each fold, the atlas of the other folds' heads."""
    shipped = shipped_template()
    bare = Template(shipped.t1, np.zeros((len(AtlasStructure), 1, 1, 1), np.float32))
    heads = [head_in_template(shared, index, bare).astype(np.float16) for index in range(HEADS)]
    return [
        Template(shipped.t1, np.mean([h for i, h in enumerate(heads) if i % FOLDS != fold], axis=0, dtype=np.float32))
        for fold in range(FOLDS)
    ]


@dataclass
class Counts:
    """What was right."""

    side: list[bool]
    side_possible: list[bool]
    region: list[bool]
    region_possible: list[bool]
    deep: list[bool]
    structure: list[bool]
    errors: dict[str, list[float]]
    in_range: dict[str, list[bool]]

    @classmethod
    def none(cls) -> Counts:
        return cls([], [], [], [], [], [], {}, {})

    def add(self, found: Findings, truth: LesionVolumes) -> list[str]:
        """Compare one case. Returns what was wrong, a line a lesion."""
        assert found.places is not None
        wrong = []
        wholes = zip(found.lesions, truth.by_lesion, truth.sides(), truth.regions(), truth.structures(), strict=True)
        for lesion, true, side, region, structure in wholes:
            if lesion.volume_ml <= SIDE_ML or lesion.side is None or lesion.region is None or lesion.structure is None:
                continue
            self.side.append(lesion.side.value == side)
            self.side_possible.append(side in lesion.side.possible)
            self.region.append(lesion.region.value == region)
            self.region_possible.append(region in lesion.region.possible)
            if not (self.side[-1] and self.region[-1]):
                left, right = true.sum(axis=1)
                wrong.append(
                    f"{lesion.volume_ml:.2f} ml at {[round(c) for c in lesion.centre_mni_mm or ()]}: {lesion.side.value}, "
                    f"{lesion.region.value}; truth {side} (left {left / (left + right):.2f}), {region}"
                )
            if lesion.volume_ml > DEEP_ML:
                deep = AtlasStructure.DEEP_GREY.label
                self.deep.append((lesion.structure.value == deep) == (structure == deep))
                self.structure.append(lesion.structure.value == structure)
        known = summarise_locations(truth, (), ())
        for kind in ("sides", "regions", "structures"):
            for ours, true_amount in zip(getattr(found.places, kind), getattr(known, kind), strict=True):
                error = ours.share.value - true_amount.share.value
                low, high = ours.share.placement or (0.0, 0.0)
                self.errors.setdefault(ours.name, []).append(error)
                self.in_range.setdefault(ours.name, []).append(low - 0.02 <= true_amount.share.value <= high + 0.02)
        return wrong


def report(counts: Counts) -> Iterator[str]:
    """The table."""
    yield f"| lesions above {SIDE_ML} ml | right | n | among the possible |"
    yield "| --- | --- | --- | --- |"
    for name, right, possible in (
        ("side", counts.side, counts.side_possible),
        ("cerebrum, cerebellum or brain stem", counts.region, counts.region_possible),
    ):
        yield f"| {name} | {np.mean(right):.1%} | {len(right)} | {np.mean(possible):.1%} |"
    yield f"| deep grey against the rest, above {DEEP_ML:g} ml | {np.mean(counts.deep):.1%} | {len(counts.deep)} | |"
    yield f"| leading structure, above {DEEP_ML:g} ml | {np.mean(counts.structure):.1%} | {len(counts.structure)} | |"
    yield ""
    yield f"| share of the lesion volume, by case | mean error | mean absolute error | within {ALLOWED} | in its range |"
    yield "| --- | --- | --- | --- | --- |"
    for name, errors in counts.errors.items():
        e = np.array(errors)
        yield (
            f"| {name} | {e.mean():+.3f} | {np.abs(e).mean():.3f} | {(np.abs(e) <= ALLOWED).mean():.0%} |"
            f" {np.mean(counts.in_range[name]):.0%} |"
        )


def halves(case: PreparedCase) -> Iterator[tuple[str, PreparedCase]]:
    """The case with half of its brain missing: cut off by the field of view, or empty."""
    turn = case.grid.canonical()
    points = case.grid.points_mm(np.moveaxis(np.indices(case.grid.shape_zyx), 0, -1))
    middle = points[case.brain.array].mean(axis=0)
    for axis, names in enumerate((("left", "right"), ("rear", "front"), ("upper", "lower"))):
        for sign, name in zip((1, -1), names, strict=True):
            kept = sign * (points[..., axis] - middle[axis]) < 0
            yield f"{name} half empty", _masked(case, kept)
    for axis, name in ((2, "one side cut off"), (0, "lower half cut off")):
        yield name, _cut(case, turn.transpose[axis], turn.transpose[axis] in turn.flips)


def _masked(case: PreparedCase, kept: BoolArray) -> PreparedCase:
    physical = {m: v.like(np.where(kept, v.array, 0)) for m, v in case.tissue_normalized.items()}
    return replace(case, tissue_normalized=physical, brain=case.brain.like(case.brain.array & kept))


def _cut(case: PreparedCase, axis: int, flipped: bool) -> PreparedCase:
    """Without the first half of an axis (z, y, x) of the array."""
    low, high = np.flatnonzero(case.brain.array.any(axis=tuple(a for a in range(3) if a != axis)))[[0, -1]]
    middle = int(low + high) // 2
    at = [slice(None)] * 3
    at[axis] = slice(middle, None)
    start = np.zeros(3)
    start[axis] = middle
    size = list(case.grid.size)
    size[2 - axis] -= middle
    origin = case.grid.points_mm(start)
    grid = replace(case.grid, size=tuple(size), origin_mm=tuple(origin.tolist()))  # type: ignore[arg-type]

    def cut(volume: Volume) -> Volume:
        return Volume(volume.array[tuple(at)], grid)

    return replace(
        case,
        images={m: cut(v) for m, v in case.images.items()},
        tissue_normalized={m: cut(v) for m, v in case.tissue_normalized.items()},
        brain=cut(case.brain),
    )


def wrong_headers(case: PreparedCase) -> Iterator[tuple[str, PreparedCase]]:
    """The same voxels under headers that turn or mirror them. Left and right swapped can't be told by anyone."""
    direction = np.reshape(case.grid.direction, (3, 3))
    for name, matrix in (
        ("upside down", np.diag([1.0, 1.0, -1.0])),
        ("front and rear swapped", np.diag([1.0, -1.0, 1.0])),
        ("turned by 90 degrees", np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])),
        ("axes permuted", np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])),
    ):
        grid = replace(case.grid, direction=tuple((matrix @ direction).ravel().tolist()))
        yield (
            name,
            replace(
                case,
                images={m: Volume(v.array, grid) for m, v in case.images.items()},
                tissue_normalized={m: Volume(v.array, grid) for m, v in case.tissue_normalized.items()},
                brain=Volume(case.brain.array, grid),
            ),
        )


#: The groups of the arterial atlas by position in its order of labels (Liu et al., Scientific Data 2023, level 2), left and right in turn.
TERRITORIES = (("ACA", 2), ("MCA", 6), ("PCA", 4), ("VB", 3), ("ventricle", 1))


def territories(source: Path, folder: Path) -> LabelMap:
    """The arterial atlas of `shared/atlases` under a BIDS name, with a table made of its order of labels."""
    rows, index = ["index\tname\tgroup\tside"], 0
    for group, pairs in TERRITORIES:
        for number in range(1, pairs + 1):
            for side in ("left", "right"):
                index += 1
                rows.append(f"{index}\t{group} {number} {side}\t{group}\t{side}")
    (folder / "territories_dseg.nii.gz").write_bytes((source / "ArterialAtlas_MNI182.nii.gz").read_bytes())
    (folder / "territories_dseg.tsv").write_text("\n".join(rows) + "\n")
    return read_label_map(folder / "territories_dseg.nii.gz")


def real(shared: Path) -> None:
    """Print what the findings say of the public cases, by the shipped members' masks."""
    ensemble = load_from_config(RunConfig(tta="none"))
    with TemporaryDirectory() as scratch:
        one = territories(shared / "atlases", Path(scratch))
        for truth in real_cases(shared / "cases"):
            result = segment_raw(truth.raw, ensemble, SilentWatcher())
            found = compute_findings(result, (one,))
            print(f"{truth.raw.name}: {result.lesion_ml:.1f} ml; {'; '.join(describe_findings(found))}")
            for amount in (*found.atlases[0].sided_groups,) if found.atlases else ():
                print(f"  {amount.name}: {amount.ml.value:.2f} ml, {format_share(amount.share)}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.findings", description="Are the findings right?")
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--hard", type=int, default=3, help="heads that are also halved and turned (default: 3)")
    parser.add_argument("--real", action="store_true", help="only the public cases, with the arterial atlas")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.real:
        real(options.shared)
        return
    folds, counts, seconds = atlases(options.shared), Counts.none(), []
    missed: list[str] = []
    tried = told = 0
    for number in range(options.heads):
        index = number % HEADS
        head = simulated(SEED + number, index, options.shared)
        case = prepare_raw(head.raw)
        started, cpu = time.perf_counter(), time.process_time()
        found = compute_findings(result_of(case, head.lesion), atlas_template=folds[index % FOLDS])
        seconds.append((time.perf_counter() - started, time.process_time() - cpu))
        if not found.registered.holds:
            missed.append(f"{head.raw.name}: {'; '.join(found.registered.problems)}")
            print(missed[-1], flush=True)
            continue
        print(
            f"{head.raw.name} {case.grid.spacing_mm} {found.registered.checks} {seconds[-1][1]:.1f} CPU s", flush=True
        )
        for line in counts.add(found, true_tally(head, case.grid)):
            print(f"  {line}", flush=True)
        if number < options.hard:
            for what, harder in (*halves(case), *wrong_headers(case)):
                placement = register_case_to_template(harder, folds[index % FOLDS])
                problems = ["no map found"] if placement is None else placement.problems()
                tried, told = tried + 1, told + bool(problems)
                print(f"  {what}: {'; '.join(problems) or f'NOT TOLD {placement}'}", flush=True)
    wall, used = np.array(seconds).T
    print(f"\n{options.heads} heads, {len(missed)} not brought to the template: {missed}")
    print(f"halves and wrong headers: told {told} of {tried}")
    print(
        f"findings take {used.mean():.1f} CPU s a case (most {used.max():.1f}), {wall.mean():.1f} s by the clock (most {wall.max():.1f})\n"
    )
    print("\n".join(report(counts)))


if __name__ == "__main__":
    main()
