"""One voxel, or a row of them, of a value that nothing in a head has decides nothing: not the levels, not the mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import GRID, phantom_arrays, phantom_case
from ensemble.errors import InputRefused
from ensemble.prepare.brain import above_background, brain_mask
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.prepare.plausibility import refuse_implausible
from ensemble.prepare.registration import register_rigidly
from ensemble.readers.base import RawCase
from ensemble.resample import resample_volume
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume
from test_unweighted import GRID as FINE
from test_unweighted import case as fine_case
from test_unweighted import scanned

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR
HOT = (65535.0, 2.0**32, 1e30, 3e38, -(2.0**32), -3e38)


def spoilt(raw: RawCase, modality: Modality, change: Callable[[AnyArray], object]) -> RawCase:
    image = raw.images[modality]
    array = image.volume.array.copy()
    change(array)
    return replace(raw, images={**raw.images, modality: replace(image, volume=image.volume.like(array))})


def elsewhere(raw: RawCase, *modalities: Modality) -> RawCase:
    """Some images on a grid of other voxels."""
    grid = replace(GRID, size=(80, 96, 48), spacing_mm=(2.0, 2.0, 2.5))
    images = {m: replace(raw.images[m], volume=resample_volume(raw.images[m].volume, grid)) for m in modalities}
    return replace(raw, images={**raw.images, **images})


def alike(case: PreparedCase, other: PreparedCase) -> None:
    assert np.array_equal(case.brain.array, other.brain.array)
    for modality in case.modalities:
        np.testing.assert_array_equal(case.images[modality].array, other.images[modality].array)
        np.testing.assert_array_equal(case.tissue_normalized[modality].array, other.tissue_normalized[modality].array)


@pytest.mark.slow
@pytest.mark.parametrize("modality", list(Modality))
@pytest.mark.parametrize("value", HOT)
@pytest.mark.parametrize("own_grid", [False, True])
@pytest.mark.parametrize("row", [False, True])
def test_hot_voxels_in_the_air_change_nothing(modality: Modality, value: float, own_grid: bool, row: bool) -> None:
    raw = phantom_case(flair=True)
    raw = elsewhere(raw, modality) if own_grid else raw

    def spoil(array: AnyArray) -> None:
        array[1, 1, slice(None) if row else 1] = value

    case = prepare_raw(spoilt(raw, modality, spoil))
    alike(case, prepare_raw(raw))
    assert any(modality.value.upper() in note and "set to 0" in note for note in case.repairs), case.repairs


@pytest.mark.slow
@pytest.mark.parametrize("modality", list(Modality))
@pytest.mark.parametrize("value", HOT)
def test_hot_voxels_in_tissue_are_refused_as_no_numbers_are(modality: Modality, value: float) -> None:
    def spoil(array: AnyArray) -> None:
        array[12, 24, 20] = value

    with pytest.raises(InputRefused, match=f"{modality.value.upper()} image holds values") as refusal:
        prepare_raw(spoilt(phantom_case(flair=True), modality, spoil))
    assert "1 of them in brain tissue" in refusal.value.found


@pytest.mark.slow
@pytest.mark.parametrize("value", [2000.0, -2000.0])
def test_voxels_a_little_hot_move_no_level(value: float) -> None:
    raw = phantom_case(flair=True)
    for modality in Modality:

        def spoil(array: AnyArray) -> None:
            array[12, 24, 20] = value
            array[1, 1, 1] = value

        case, plain = prepare_raw(spoilt(raw, modality, spoil)), prepare_raw(raw)
        same = case.brain.array & plain.brain.array
        same[11:14, 23:26, 19:22] = False
        assert same.sum() > 0.99 * plain.brain.array.sum()
        for other in Modality:
            np.testing.assert_allclose(
                case.tissue_normalized[other].array[same], plain.tissue_normalized[other].array[same], rtol=2e-3
            )


@pytest.mark.parametrize("value", HOT)
def test_an_image_that_is_constant_but_for_a_hot_voxel_is_constant(value: float) -> None:
    for level in (0.0, 7.0):

        def spoil(array: AnyArray, level: float = level) -> None:
            array[:] = level
            array[3, 3, 3] = value

        with pytest.raises(InputRefused, match="constant|no number"):
            prepare_raw(spoilt(phantom_case(), DWI, spoil))


@pytest.mark.parametrize("value", [v for v in HOT if v > 0])
def test_the_background_is_told_whatever_a_hot_voxel_says(value: float) -> None:
    arrays = phantom_arrays()
    before = above_background(arrays[DWI])
    hot = arrays[DWI].copy()
    hot[1, 1, :] = value
    after = above_background(hot)
    after[1, 1, :] = False
    assert np.array_equal(before, after)
    one = arrays[DWI].copy()
    one[1, 1, 1] = value  # a row is a piece, of 3 ml here
    assert np.array_equal(brain_mask(one, arrays[ADC]), brain_mask(arrays[DWI], arrays[ADC]))


@pytest.mark.slow
@pytest.mark.parametrize("level", [1e-30, 1e-3, 1.0, 1e5, 1e30])
def test_no_unit_makes_an_image_hot(level: float) -> None:
    raw = phantom_case(flair=True)
    image = raw.images[DWI]
    scaled = replace(image, volume=image.volume.like((image.volume.array * np.float32(level)).astype(np.float32)))
    case = prepare_raw(replace(raw, images={**raw.images, DWI: scaled}))
    assert not [note for note in case.repairs if "hot" in note or "set to 0" in note]


def test_resampling_noise_makes_no_brain_hot() -> None:
    """A brain in a wide field of view whose background is 1e-22: most of what is positive is noise."""
    raw = phantom_case()
    wide = replace(GRID, size=(100, 120, 70))
    images = {}
    for modality, image in raw.images.items():
        array = np.full(wide.shape_zyx, 1e-22, np.float32)
        array[:24, :48, :40] += image.volume.array
        images[modality] = replace(image, volume=Volume(array, wide))
    case = prepare_raw(replace(raw, images=images), "never")
    assert case.brain.array[:24, :48, :40].sum() == prepare_raw(raw).brain.array.sum()


def test_a_clipped_dwi_with_a_hot_voxel_is_clipped() -> None:
    dwi, adc, inside = scanned(1000, lesion_share=0.1)
    clipped = np.minimum(dwi, np.float32(1.1) * np.median(dwi[inside]))
    refused = pytest.raises(InputRefused, match="clipped")
    with refused:
        refuse_implausible(clipped, adc, inside, "here")
    clipped[20, 32, 10:14] = 5 * clipped.max()
    with refused:
        refuse_implausible(clipped, adc, inside, "here")


def test_registration_does_not_see_a_hot_voxel() -> None:
    from scipy import ndimage

    dwi, _, inside = scanned(1000)
    fixed = Volume(dwi, FINE)
    moving = Volume(ndimage.shift(dwi, (0, 2, 1), order=1).astype(np.float32), FINE)
    found = [register_rigidly(moving, moving, fixed, inside)]
    for value in (1e4, 1e9, -1e9):
        hot = moving.array.copy()
        hot[2, 3, 4:9] = value
        spoiled = moving.like(hot)
        found.append(register_rigidly(spoiled, spoiled, fixed, inside))
    assert all(one.transform is not None for one in found)
    shifts = np.array([one.transform.GetTranslation() for one in found if one.transform])
    assert np.abs(shifts - shifts[0]).max() < 0.3


def test_an_adc_on_another_grid_with_a_hot_voxel_in_the_air() -> None:
    """The example of the issue: 2^32 in one air voxel made "ADC empty in 100 %"."""
    dwi, adc, _ = scanned(1000, lesion_share=0.05)
    raw = fine_case(dwi, adc)
    grid = replace(FINE, size=(84, 96, 60), spacing_mm=(2.0, 2.0, 2.7))
    image = replace(raw.images[ADC], volume=resample_volume(raw.images[ADC].volume, grid), path=Path("adc.mha"))
    raw = replace(raw, images={**raw.images, ADC: image})
    alike(prepare_raw(spoilt(raw, ADC, lambda a: a.__setitem__((1, 1, 1), 2.0**32))), prepare_raw(raw))


def test_a_dwi_whose_brightest_values_became_negative_is_refused() -> None:
    """Unsigned 16 bits read as signed: the lesion was lost, and the mask empty."""
    raw = phantom_case()
    wrapped = spoilt(raw, DWI, lambda a: a.__setitem__(..., (a * 70).astype(np.uint16).view(np.int16)))
    assert (wrapped.images[DWI].volume.array < 0).any()
    with pytest.raises(InputRefused, match="negative values"):
        prepare_raw(wrapped)
    prepare_raw(spoilt(raw, DWI, lambda a: a.__setitem__(..., (a * 40).astype(np.uint16).view(np.int16))))
    ringing = spoilt(raw, DWI, lambda a: a.__setitem__((slice(None), slice(None), slice(3, 6)), -30.0))
    prepare_raw(ringing)
