"""FLAIR to DWI: found where the patient moved, left alone where the headers are right, the same on any number of threads."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from conftest import shared
from ensemble.geometry import Grid
from ensemble.prepare import registration
from ensemble.prepare.brain import brain_mask
from ensemble.prepare.case import prepare_raw
from ensemble.prepare.registration import RegistrationResult, register_rigidly
from ensemble.readers.base import RawCase, RawImage
from ensemble.resample import resample_volume
from ensemble.types import AnyArray, BoolArray
from ensemble.volume import Volume, from_sitk
from odd_inputs import ADC, DWI, FLAIR, sample, turned


def case() -> tuple[Volume, Volume, BoolArray]:
    images = sample(flair=True).images
    dwi, adc = from_sitk(images[DWI]), from_sitk(images[ADC])
    return from_sitk(images[FLAIR]), dwi, brain_mask(dwi.array, adc.array)


def registered(flair: Volume, dwi: Volume, brain: BoolArray) -> RegistrationResult:
    return register_rigidly(flair, resample_volume(flair, dwi.grid), dwi, brain)


def points(brain: BoolArray, grid: Grid) -> AnyArray:
    """Some places in the brain (n, 3), mm."""
    voxels = np.argwhere(brain)[::997, ::-1]
    return (grid.affine[:3, :3] @ voxels.T).T + grid.affine[:3, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("degrees", "shift"), [(3.0, (3.0, -2.0, 1.5)), (8.0, (-9.0, 6.0, 5.0))])
def test_a_patient_who_moved_is_found(degrees: float, shift: tuple[float, float, float]) -> None:
    _, dwi, brain = case()
    moved = from_sitk(turned(degrees, shift)(sample(flair=True).images[FLAIR]))
    found = registered(moved, dwi, brain)
    assert found.transform is not None
    motion = sitk.Euler3DTransform()
    motion.SetRotation(*(np.deg2rad(degrees) * np.array([0.6, -0.5, 0.62])))
    motion.SetTranslation(shift)
    off = [
        np.linalg.norm(np.subtract(found.transform.TransformPoint(p), motion.TransformPoint(p)))
        for p in points(brain, dwi.grid)
    ]
    assert np.max(off) < 1.0  # mm
    assert "moved by" in found.summary


def test_right_headers_are_kept() -> None:
    found = registered(*case())
    assert found.transform is None
    assert "no better" in found.summary


def test_an_image_of_something_else_keeps_its_header() -> None:
    flair, dwi, brain = case()
    noise = flair.like(np.random.default_rng(0).random(flair.array.shape).astype(np.float32))
    assert registered(noise, dwi, brain).transform is None


@pytest.mark.slow
def test_the_number_of_threads_changes_nothing(monkeypatch) -> None:
    """Not a digit, even before the transform is rounded."""
    monkeypatch.setattr(registration, "_rounded", lambda transform: transform)
    _, dwi, brain = case()
    moved = from_sitk(turned(4, (4.0, 2.0, -3.0))(sample(flair=True).images[FLAIR]))
    before, found = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads(), []
    try:
        for threads in (1, 3, 3):
            sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
            found.append(registered(moved, dwi, brain).transform)
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
    assert all(found)
    assert len({transform.GetParameters() for transform in found}) == 1  # type: ignore[union-attr]


@pytest.mark.slow
def test_any_kind_of_numbers_is_registered() -> None:
    _, dwi, brain = case()
    moved = from_sitk(turned(4, (4.0, 2.0, -3.0))(sample(flair=True).images[FLAIR]))
    expected = registered(moved, dwi, brain).transform
    for kind in (np.int16, np.float64):
        found = registered(moved.like(moved.array.astype(kind)), dwi, brain).transform
        assert found is not None
        assert expected is not None
        assert np.allclose(found.GetParameters(), expected.GetParameters(), atol=0.2)


def test_a_large_real_flair_takes_under_ten_seconds() -> None:
    images = [
        from_sitk(sitk.ReadImage(str(shared(f"cases/isles22_0009/{name}.nii.gz")), sitk.sitkFloat32))
        for name in ("flair", "dwi", "adc")
    ]
    flair, dwi, adc = images
    assert flair.array.shape == (29, 512, 512)
    brain = brain_mask(dwi.array, adc.array)
    grid = replace(flair.grid, origin_mm=tuple(np.add(flair.grid.origin_mm, (6.0, -4.0, 3.0))))  # type: ignore[arg-type]
    started = time.process_time()
    found = registered(Volume(flair.array, grid), dwi, brain)
    assert time.process_time() - started < 10
    assert found.transform is not None


def test_never_takes_flair_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever registered it already, by whatever means, gets it as it is."""
    images = {modality: from_sitk(image) for modality, image in sample(flair=True).images.items()}
    raw = RawCase("moved", {modality: RawImage(Path(modality), volume) for modality, volume in images.items()})
    aligned = images[FLAIR].grid
    moved = replace(aligned, origin_mm=(aligned.origin_mm[0] + 6, *aligned.origin_mm[1:]))
    raw = replace(raw, images={**raw.images, FLAIR: RawImage(Path("flair"), Volume(images[FLAIR].array, moved))})
    monkeypatch.setattr("ensemble.prepare.flair.register_rigidly", lambda *_: pytest.fail("it was registered"))
    case = prepare_raw(raw, registration="never")
    by_header = resample_volume(Volume(images[FLAIR].array, moved), images[DWI].grid)
    inside = case.brain.array
    np.testing.assert_array_equal(case.images[FLAIR].array[inside], by_header.array[inside])
    assert any("by its header" in text and "--registration never" in text for text in case.repairs)


def test_published_members_get_flair_by_cubic_splines() -> None:
    """As DeepISLES' Elastix interpolates: what rings around the brain is not 0, and networks normalise over it."""
    images = {modality: from_sitk(image) for modality, image in sample(flair=True).images.items()}
    raw = RawCase("cubic", {modality: RawImage(Path(modality), volume) for modality, volume in images.items()})
    case = prepare_raw(raw, registration="never")
    ours, inside = case.as_read[FLAIR].array, case.brain.array
    moving = sitk.Cast(sample(flair=True).images[FLAIR], sitk.sitkFloat32)
    theirs = sitk.Resample(moving, sample(flair=True).images[DWI], sitk.Transform(), sitk.sitkBSpline, 0.0)
    np.testing.assert_allclose(ours, sitk.GetArrayFromImage(theirs), atol=1e-4 * ours.max())
    assert (ours != 0).mean() > 1.5 * (case.images[FLAIR].array != 0).mean()
    assert np.corrcoef(ours[inside], case.images[FLAIR].array[inside])[0, 1] > 0.95


def test_a_flair_on_the_dwi_grid_stays_as_it_is_with_never() -> None:
    images = {modality: from_sitk(image) for modality, image in sample(flair=True).images.items()}
    there = resample_volume(images[FLAIR], images[DWI].grid)
    raw = RawCase("same", {m: RawImage(Path(m), volume) for m, volume in {**images, FLAIR: there}.items()})
    case = prepare_raw(raw, registration="never")
    np.testing.assert_array_equal(case.as_read[FLAIR].array, there.array)
    assert not any("registration" in text for text in case.repairs)
