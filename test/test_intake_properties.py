"""However one case is stored, its mask lies in the same place of the world (hypothesis)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

import odd_inputs as odd
from ensemble.config import RunConfig
from ensemble.families.base import InferenceSettings
from ensemble.families.spec import MemberSpec
from ensemble.metrics import dice
from ensemble.pipeline import Ensemble, load_from_config, segment_raw
from ensemble.progress import SilentWatcher
from ensemble.readers.base import RawCase, RawImage
from ensemble.types import Modality
from ensemble.volume import from_sitk, to_sitk
from odd_inputs import ADC, DWI, Case, cast, cropped, flipped, permuted, regridded, sample, turned

AXES = st.lists(st.sampled_from((0, 1, 2)), unique=True)
ORDERS = st.permutations((0, 1, 2))
ANGLES = st.floats(-40, 40)
SHIFTS = st.tuples(*[st.floats(-200, 200)] * 3)
#: The sample case's brain leaves one empty voxel at each side, and little brain in the outermost slices.
MARGINS = st.lists(st.integers(0, 2), min_size=6, max_size=6)
PIXELS = st.sampled_from([pixel for pixel in odd.PIXELS if pixel != "uint8"])
UNITS = st.sampled_from((1.0, 1e-3, 1e-6))


def rule() -> Ensemble:
    spec = MemberSpec("rule", "nnunet", Path("/nowhere"))
    return Ensemble(RunConfig(), InferenceSettings(), (spec,), (odd.Rule("rule"),), 0.0)


def mask_of(case: Case, ensemble: Ensemble) -> sitk.Image:
    images = {m: RawImage(Path(f"{m}.mha"), from_sitk(sitk.Cast(i, sitk.sitkFloat32))) for m, i in case.images.items()}
    return to_sitk(segment_raw(RawCase("case", images), ensemble, SilentWatcher()).fused.mask)


@cache
def plain() -> sitk.Image:
    return mask_of(sample(), rule())


def agreement(mask: sitk.Image, expected: sitk.Image) -> float:
    there = sitk.Resample(mask, expected, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
    return dice(sitk.GetArrayFromImage(expected) > 0, sitk.GetArrayFromImage(there) > 0)


def anywhere(case: Case, degrees: float, shift: tuple[float, float, float]) -> Case:
    return case.change(turned(degrees, shift))


def brought_back(mask: sitk.Image, degrees: float, shift: tuple[float, float, float]) -> sitk.Image:
    """The mask where the case was before `anywhere` moved it."""
    motion = sitk.Euler3DTransform()
    motion.SetRotation(*(np.deg2rad(degrees) * np.array([0.6, -0.5, 0.62])))
    motion.SetTranslation([float(mm) for mm in shift])
    back = sitk.Euler3DTransform(motion.GetInverse())
    moved = sitk.Image(mask)
    matrix = np.reshape(back.GetMatrix(), (3, 3)) @ np.reshape(mask.GetDirection(), (3, 3))
    moved.SetDirection(matrix.ravel().tolist())
    moved.SetOrigin(back.TransformPoint(mask.GetOrigin()))
    return moved


@pytest.mark.slow
@settings(max_examples=15)
@given(axes=AXES, order=ORDERS, degrees=ANGLES, shift=SHIFTS, margins=MARGINS, pixel=PIXELS, unit=UNITS)
def test_nothing_changes_where_nothing_is_resampled(
    axes: list[int],
    order: list[int],
    degrees: float,
    shift: tuple[float, float, float],
    margins: list[int],
    pixel: str,
    unit: float,
) -> None:
    case = sample().change(cast(pixel), DWI).change(lambda i: i * unit, ADC)
    case = anywhere(case.change(cropped(*margins)).change(flipped(*axes)).change(permuted(*order)), degrees, shift)
    mask = brought_back(mask_of(case, rule()), degrees, shift)
    assert agreement(mask, plain()) >= 0.98


@pytest.mark.slow
@settings(max_examples=10)
@given(axes=AXES, order=ORDERS, margins=MARGINS, first=st.sampled_from((DWI, ADC)))
def test_dwi_and_adc_may_be_stored_differently(
    axes: list[int], order: list[int], margins: list[int], first: Modality
) -> None:
    case = sample().change(flipped(*axes), first).change(permuted(*order), first).change(cropped(*margins), ADC)
    assert agreement(mask_of(case, rule()), plain()) >= 0.98


@pytest.mark.slow
@settings(max_examples=10)
@given(degrees=st.floats(-25, 25), shift=st.floats(-1, 1), spacing=st.tuples(*[st.floats(1.2, 2.0)] * 3))
def test_an_adc_on_any_grid_gives_the_same_mask_up_to_interpolation(
    degrees: float, shift: float, spacing: tuple[float, float, float]
) -> None:
    # what is interpolated twice is compared with what is interpolated: ADC smoothed by its own grid
    case = sample().change(regridded(spacing, degrees, shift), ADC)
    assert agreement(mask_of(case, rule()), plain()) >= 0.9


@cache
def plain_by_network() -> tuple[Ensemble, sitk.Image]:
    ensemble = load_from_config(RunConfig(device="cpu", tta="none", members=("iso3d",)))
    return ensemble, mask_of(sample(), ensemble)


@pytest.mark.parametrize(
    ("axes", "order", "degrees"), [((0,), (0, 1, 2), 0), ((), (2, 0, 1), 0), ((1,), (0, 2, 1), 15)]
)
@pytest.mark.slow
def test_shipped_networks_follow_the_header(axes: tuple[int, ...], order: tuple[int, ...], degrees: float) -> None:
    """The same with a network, which looks at more than a voxel."""
    ensemble, expected = plain_by_network()
    assert sitk.GetArrayViewFromImage(expected).any()
    case = anywhere(sample().change(flipped(*axes)).change(permuted(*order)), degrees, (30.0, -40.0, 20.0))
    assert agreement(brought_back(mask_of(case, ensemble), degrees, (30.0, -40.0, 20.0)), expected) >= 0.98
