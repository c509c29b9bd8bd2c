"""The same tissue gets the same number, whatever unit, gain and background a case comes with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from conftest import shared
from ensemble.errors import InputRefused
from ensemble.prepare.brain import brain_mask
from ensemble.prepare.draft import DraftCase
from ensemble.prepare.units import (
    CLIP,
    adc_mode,
    adc_unit_factor,
    normalize_by_tissue,
    normalize_intensities,
)
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume

TISSUE_ADC = 0.8  # 1e-3 mm^2/s


def head() -> tuple[AnyArray, AnyArray, AnyArray]:
    """DWI, ADC (1e-3 mm^2/s) and the mask of a ball of tissue around a ball of CSF, with noise."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, 40)] * 3, indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2)
    brain, csf = radius < 0.9, radius < 0.45
    noise = 1 + np.random.default_rng(1).normal(0, 0.05, brain.shape)
    dwi = brain * np.where(csf, 90.0, 300.0) * noise
    adc = brain * np.where(csf, 3.0, TISSUE_ADC) * noise
    return dwi.astype(np.float32), adc.astype(np.float32), brain


@pytest.mark.parametrize(("scale", "factor"), [(1e-3, 1e3), (1.0, 1.0), (1e3, 1e-3)])
def test_each_adc_unit_is_recognised(scale: float, factor: float) -> None:
    _, adc, brain = head()
    assert adc_unit_factor(adc * scale, brain) == factor


@pytest.mark.parametrize("scale", [0.0, 1e-9, 0.03, 50.0, 1e6, -1.0])
def test_adc_in_no_known_unit_is_refused(scale: float) -> None:
    _, adc, brain = head()
    with pytest.raises(InputRefused, match="no usual unit"):
        adc_unit_factor(adc * scale, brain)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    "change", [lambda adc: 2.4 * adc, lambda adc: adc + 1.0 * (adc > 0), lambda adc: adc + 1.5 * (adc > 0)]
)
def test_an_adc_with_a_wrong_factor_or_offset_is_refused(change: Callable[[AnyArray], AnyArray], unit: float) -> None:
    """Its median fits a unit, but its tissue does not: what was taken for tissue was a rim, and the mask was empty."""
    dwi, adc, brain = head()
    with pytest.raises(InputRefused, match="hardly any value of brain tissue"):
        normalize_by_tissue(dwi, change(adc) * unit, None, brain)


def test_the_mode_is_the_tissues_not_the_fluids() -> None:
    _, adc, brain = head()
    assert adc_mode(adc, brain) == pytest.approx(TISSUE_ADC, abs=0.02)


@pytest.mark.parametrize(("dwi_gain", "adc_scale"), [(1.0, 1.0), (0.01, 1e-3), (37.0, 1e3)])
def test_tissue_is_one_whatever_gain_and_unit(dwi_gain: float, adc_scale: float) -> None:
    dwi, adc, brain = head()
    images = normalize_by_tissue(dwi * dwi_gain, adc * adc_scale, dwi * 7, brain)
    tissue = brain & (adc > 0.6) & (adc < 1.0)
    for modality in Modality:
        assert np.median(images[modality][tissue]) == pytest.approx(1.0, abs=0.03)
        assert images[modality].dtype == np.float32
        assert not images[modality][~brain].any()


def test_values_are_clipped_and_inputs_left_alone() -> None:
    dwi, adc, brain = head()
    dwi[20, 20, 35], adc[20, 20, 34] = 1e6, -5.0
    before = dwi.copy(), adc.copy()
    images = normalize_by_tissue(dwi, adc, None, brain)
    assert Modality.FLAIR not in images
    assert images[Modality.DWI].max() == CLIP[Modality.DWI][1]
    assert images[Modality.ADC].min() == 0.0
    assert np.array_equal(dwi, before[0])
    assert np.array_equal(adc, before[1])


def test_flair_may_miss_part_of_the_brain() -> None:
    dwi, adc, brain = head()
    flair = dwi.copy()
    flair[:18] = 0
    images = normalize_by_tissue(dwi, adc, flair, brain)
    tissue = brain & (adc > 0.6) & (adc < 1.0)
    tissue[:18] = False
    assert np.median(images[Modality.FLAIR][tissue]) == pytest.approx(1.0, abs=0.03)


def test_a_modality_without_signal_is_refused() -> None:
    dwi, adc, brain = head()
    with pytest.raises(InputRefused, match="FLAIR"):
        normalize_by_tissue(dwi, adc, np.zeros_like(dwi), brain)


@pytest.mark.parametrize("modality", [Modality.ADC, Modality.FLAIR])
def test_a_refusal_names_the_file_of_the_image(modality: Modality) -> None:
    dwi, adc, brain = head()
    arrays = {Modality.DWI: dwi, Modality.ADC: adc, Modality.FLAIR: dwi}
    arrays[modality] = np.zeros_like(dwi)
    images = {key: Volume.from_numpy(array.astype(np.float32).T, np.eye(4)) for key, array in arrays.items()}
    case = DraftCase("x", {key: Path(f"{key}.mha") for key in images}, images, brain=brain)
    with pytest.raises(InputRefused) as refused:
        normalize_intensities(case)
    assert refused.value.where == f"{modality}.mha"


@pytest.mark.parametrize(
    "background", [0.0, 1e-22, 1e-6, -3.0, "noise"], ids=["zero", "1e-22", "1e-6", "negative ringing", "noise"]
)
def test_the_brain_is_found_on_any_background(background: float | str) -> None:
    dwi, adc, brain = head()
    floor = np.random.default_rng(2).normal(0, 1e-3, dwi.shape) if background == "noise" else float(background)
    found = brain_mask(np.where(brain, dwi, floor), np.where(brain, adc, floor * 1e-3))
    assert np.array_equal(found, brain)


def test_holes_are_filled_and_debris_is_left_out() -> None:
    dwi, adc, brain = head()
    dwi[20, 20, 20] = adc[20, 20, 20] = 0.0
    dwi[0, 0, 0] = 300.0
    assert np.array_equal(brain_mask(dwi, adc), brain)


def test_an_empty_case_has_no_brain() -> None:
    assert not brain_mask(np.zeros((3, 4, 5)), np.zeros((3, 4, 5))).any()


@pytest.mark.parametrize(
    ("case", "ending", "factor"),
    [
        ("isles22_0002", "nii.gz", 1e3),
        ("isles22_0003", "nii.gz", 1e3),
        ("isles22_0009", "nii.gz", 1.0),
        ("isles22_0166", "mha", 1e-3),
    ],
)
def test_real_cases(case: str, ending: str, factor: float) -> None:
    dwi, adc = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(shared(f"cases/{case}/{name}.{ending}")))) for name in ("dwi", "adc")
    )
    brain = brain_mask(dwi, adc)
    voxel_ml = {"isles22_0166": 1.796875**2 * 4.8 / 1000}.get(case, 0.008)
    assert 1000 < brain.sum() * voxel_ml < 1900
    assert adc_unit_factor(adc, brain) == factor
    assert 0.65 < adc_mode(adc * factor, brain) < 0.95
    images = normalize_by_tissue(dwi, adc, None, brain)
    tissue = np.abs(images[Modality.ADC] - 1) < 0.15
    assert np.median(images[Modality.DWI][tissue]) == pytest.approx(1.0, abs=0.05)
