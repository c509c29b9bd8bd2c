"""What images and lesions show by themselves: each fault raises its own number, and no number hangs on the order of the axes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from ensemble.geometry import Grid
from ensemble.prepare.case import PreparedCase
from ensemble.trust.calibration import ATYPICALITY_SCORES, Calibration, UsualRange
from ensemble.trust.judge import TrustModel
from ensemble.trust.quality import IMAGES, LESIONS, TraitMeaning, measure_image_quality, measure_lesion_traits
from ensemble.trust.reference import References, ReferenceTraits
from ensemble.types import AnyArray, BoolArray, FloatArray, Modality
from ensemble.volume import Volume

SHAPE, SPACING = (24, 56, 46), (6.0, 3.5, 3.5)
Arrays = tuple[FloatArray, FloatArray, BoolArray]
#: Images whose number must have changed; the numbers that tell it.
FAULTS: dict[str, tuple[str, ...]] = {
    "noise": ("noise_dwi", "noise_adc"),
    "blur": ("sharpness",),
    "steps": ("slice_levels",),
    "shifts": ("slice_jumps", "surface"),
    "scalp": ("rim_dwi", "rim_adc"),
    "scalp on one side": ("rim_part",),
    "mirrored": ("fluid",),
    "half": ("height", "skew_height"),
    "sideways": ("length",),
    "t2": ("contrast",),
}


@cache
def head(seed: int = 0) -> Arrays:
    """DWI, ADC and mask (z, y, x) of a lopsided ellipsoid with fluid in the middle, noise of 3 %."""
    draw = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    z, y = z + 0.1 * y + 0.05 * draw.standard_normal(), y + 0.05 * draw.standard_normal()
    brain = (z / 0.85) ** 2 + (y / 0.9) ** 2 + (x / (0.8 + 0.1 * z)) ** 2 < 1
    fluid = (z / 0.3) ** 2 + (y / 0.4) ** 2 + (x / 0.2) ** 2 < 1
    folds = 0.1 * ndimage.gaussian_filter(draw.standard_normal(SHAPE), 2) / 0.1
    dwi = np.where(fluid, 0.4, 1.0 + folds) + 0.03 * draw.standard_normal(SHAPE)
    adc = np.where(fluid, 3.5, 1.0 - 0.5 * folds) + 0.03 * draw.standard_normal(SHAPE)
    return np.where(brain, dwi, 0).astype(np.float32), np.where(brain, adc, 0).astype(np.float32), brain


def prepared(
    arrays: Arrays, spacing: tuple[float, float, float] = SPACING, direction: AnyArray | None = None
) -> PreparedCase:
    z, y, x = arrays[0].shape
    cosines = tuple((np.eye(3) if direction is None else direction).ravel().tolist())
    grid = Grid((x, y, z), spacing[::-1], (0.0, 0.0, 0.0), cosines)
    dwi, adc, brain = (Volume(np.ascontiguousarray(array), grid) for array in arrays)
    images = {Modality.DWI: dwi, Modality.ADC: adc}
    return PreparedCase("head", images, images, images, brain, ())


def spoilt(kind: str) -> Arrays:
    dwi, adc, brain = (array.copy() for array in head(99))
    draw = np.random.default_rng(5)
    match kind:
        case "noise":
            dwi += 0.2 * draw.standard_normal(SHAPE)
            adc += 0.2 * draw.standard_normal(SHAPE)
        case "blur":
            dwi = ndimage.gaussian_filter(dwi, (0, 1.5, 1.5))
        case "steps":
            dwi *= (1 + 0.3 * draw.standard_normal(SHAPE[0]))[:, None, None]
        case "shifts":
            for array in (dwi, adc, brain):
                for number in range(SHAPE[0]):
                    array[number] = np.roll(array[number], draw.integers(-3, 4, 2), (0, 1))
        case "scalp":
            outer = ndimage.binary_dilation(brain, np.ones((1, 3, 3))) & ~brain
            dwi[outer], adc[outer] = 1.8, 0.3
            brain |= outer
        case "scalp on one side":
            outer = ndimage.binary_dilation(brain, np.ones((1, 3, 3))) & ~brain
            outer[:, :, : SHAPE[2] * 3 // 4] = False
            dwi[outer], adc[outer] = 1.8, 0.3
            brain |= outer
        case "mirrored":
            dwi = 1.8 - dwi
        case "half":
            brain[: SHAPE[0] // 2] = False
        case "sideways":
            dwi, adc, brain = (np.rot90(array, axes=(1, 2)) for array in (dwi, adc, brain))
        case "t2":
            dwi = np.where(adc > 2, 2.0, 0.4 + 0.6 * adc)
    return np.where(brain, dwi, 0).astype(np.float32), np.where(brain, adc, 0).astype(np.float32), brain


@pytest.fixture(scope="module")
def normal() -> ReferenceTraits:
    found = ReferenceTraits.of([measure_image_quality(prepared(head(seed))) for seed in range(12)], IMAGES, 10)
    assert found is not None
    assert set(found.mean) == set(IMAGES)
    return found


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_raises_its_own_numbers(kind: str, normal: ReferenceTraits) -> None:
    usual, wrong = (measure_image_quality(prepared(arrays)) for arrays in (head(99), spoilt(kind)))
    assert normal.oddest(usual)[1] < 4
    for name in FAULTS[kind]:
        assert IMAGES[name].excess((wrong[name] - normal.mean[name]) / normal.spread[name]) > 5, name
    assert normal.distance(wrong) > 2 * normal.distance(usual)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
def test_the_order_and_direction_of_axes_on_disk_change_nothing(order: tuple[int, ...], flips: tuple[int, ...]) -> None:
    """The same head, stored along other axes, with a header that says so: where slices lie, too, is found again."""
    arrays, expected = head(3), measure_image_quality(prepared(head(3)))
    stored = [np.flip(array, [a for a in range(3) if flips[a] < 0]).transpose(order) for array in arrays]
    spacing = tuple(SPACING[axis] for axis in order)
    direction = np.zeros((3, 3))
    for new, old in enumerate(order):  # array axis `new` is world axis 2 - old, whose array axis was `old`
        direction[2 - old, 2 - new] = flips[old]
    told = measure_image_quality(prepared((stored[0], stored[1], stored[2]), spacing, direction))  # type: ignore[arg-type]
    assert told == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_fine_voxels_change_the_shape_hardly() -> None:
    """They are thinned for it, since a brain of ten million voxels would take seconds."""
    coarse = prepared(head(3), (2.0, 2.0, 2.0))
    fine = prepared(tuple(array.repeat(2, 0).repeat(2, 1).repeat(2, 2) for array in head(3)), (1.0, 1.0, 1.0))  # type: ignore[arg-type]
    expected, told = measure_image_quality(coarse), measure_image_quality(fine)
    for name in ("surface", "depth", "height", "length", "skew_height", "skew_length", "tilt", "rim_dwi", "rim_adc"):
        assert told[name] == pytest.approx(expected[name], abs=0.06), name


def lesion(adc: float, dwi: float, around: float = 1.0) -> tuple[PreparedCase, BoolArray]:
    """A head with a ball of these values, and ADC `around` within a centimetre of it."""
    images, maps, brain = (array.copy() for array in head(1))
    at = np.ones(SHAPE, bool)
    at[12, 40, 30] = False
    distance = ndimage.distance_transform_edt(at, SPACING)
    maps[(distance < 20) & brain] *= around
    inside = (distance < 9) & brain
    maps[inside], images[inside] = adc, dwi
    return prepared((images, maps, brain)), inside


def test_lesions_and_what_is_around_them() -> None:
    infarct = measure_lesion_traits(*lesion(adc=0.6, dwi=1.5))
    assert infarct["adc"] == pytest.approx(0.6)
    assert infarct["t2"] == pytest.approx(np.log(1.5) - 0.75 * 0.4, abs=1e-4)
    assert infarct["around"] == pytest.approx(1.0, abs=0.05)
    assert measure_lesion_traits(*lesion(adc=0.6, dwi=1.5, around=1.5))["around"] == pytest.approx(1.5, abs=0.1)
    assert measure_lesion_traits(*lesion(adc=1.3, dwi=1.5))["adc"] == pytest.approx(1.3)
    case, mask = lesion(adc=0.6, dwi=1.5)
    assert measure_lesion_traits(case, np.zeros_like(mask)) == {}
    assert set(measure_lesion_traits(case, mask)) == set(LESIONS)


def test_what_is_no_fault_is_not_suspicious() -> None:
    """An ADC as low as that of no reference case speaks for an infarct, not against it."""
    assert [LESIONS["adc"].excess(x) for x in (-9.0, 2.0)] == [0.0, 2.0]
    assert [IMAGES["rim_adc"].excess(x) for x in (9.0, -2.0)] == [0.0, 2.0]
    assert [TraitMeaning("size").excess(x) for x in (9.0, -2.0)] == [9.0, 2.0]


def test_hardly_a_brain_has_fewer_numbers_and_none_that_is_not_finite() -> None:
    dwi, adc, brain = (array.copy() for array in head(1))
    for kept in (0, 1, 5):
        few = np.zeros_like(brain)
        few.ravel()[np.flatnonzero(brain)[:kept]] = True
        told = measure_image_quality(prepared((dwi * few, adc * few, few)))
        assert np.isfinite(list(told.values())).all()
    assert measure_image_quality(prepared((dwi, adc, np.zeros_like(brain)))) == {}


def test_each_look_has_a_limit_of_its_own() -> None:
    limits = {"quality": UsualRange(0.0, 0.5), "mimicry": UsualRange(0.0, 3.0)}
    known = Calibration({}, 0.0, {}, 0.9, 0.2, limits, UsualRange(0.0, 1.0), {})
    judge = TrustModel(References({}, None), known)
    assert judge.verdict({"quality": 2.0, "mimicry": 1.0}, empty=False).verdict == "check"
    assert judge.verdict({"quality": 1.0, "mimicry": 2.0}, empty=False).verdict == "good"
    told = judge.verdict({"quality": 1.0, "mimicry": 1e3}, empty=False, oddities={"mimicry": "oedema"})
    assert (told.verdict, told.why) == ("poor", ("oedema",))
    with_dice = replace(known, slopes={"agreement": 1.0})
    told = replace(judge, calibration=with_dice).verdict({"agreement": 0.9, "mimicry": 1e3}, empty=False)
    assert told.why[-1] == "the expected Dice holds only if this is an infarct"
    assert judge.verdict({"histogram": 9.0}, empty=False).verdict is None  # no limit of that is known
    assert set(limits) < set(ATYPICALITY_SCORES)
