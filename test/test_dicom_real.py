"""Real vendor files as dcm2niix reads them, and whole cases in every form of DICOM: skipped where the material, or dcm2niix, is missing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import odd_inputs as odd
from conftest import shared
from dicom_files import write_enhanced, write_mosaic, write_series, write_tiles
from ensemble.cli import main
from ensemble.config import RunConfig
from ensemble.errors import InputRefused
from ensemble.families.base import InferenceSettings
from ensemble.families.spec import MemberSpec
from ensemble.pipeline import Ensemble, segment_raw
from ensemble.progress import LogWatcher
from ensemble.readers.imagefile import read_case_files, read_image
from ensemble.types import Modality
from ensemble.volume import Volume, from_sitk, to_sitk
from test_dicom_kinds import same_in_the_world

DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR

#: folder -> modality, b-value of what is taken. Of canon_enhanced dcm2niix gets the distance of slices wrong, since this part of the file
#: has fewer frames than its header's organisation tells (57 mm over 39 instead of 19 gaps): the places in the file say 3 mm.
READ = {
    "canon_enhanced": (DWI, 1500),
    "ge_implicit_no_creator": (DWI, 1000),
    "philips_export_with_private_objects": (DWI, 1000),
    "siemens_mosaic_oblique": (DWI, 2000),
    "siemens_xa30_classic_exam": (ADC, None),
    "siemens_xa30_enhanced_trace_adc": (ADC, None),
    "toshiba_b0_without_tag": (DWI, 1500),
    "uih_vframe": (DWI, 928),
}
#: What the README of each folder says of slices and spacing (mm).
GEOMETRY = {
    "canon_enhanced": ((80, 80, 20), (3, 3, 3)),
    "ge_implicit_no_creator": ((128, 128, 4), (2, 2, 2)),
    "philips_export_with_private_objects": ((112, 112, 2), (2, 2, 2)),
    "siemens_mosaic_oblique": ((72, 72, 36), (3, 3, 3)),
    "siemens_xa30_classic_exam": ((72, 72, 2), (3, 3, 3)),
    "siemens_xa30_enhanced_trace_adc": ((72, 72, 39), (3, 3, 3)),
    "toshiba_b0_without_tag": ((64, 64, 2), (3, 3, 3)),
    "uih_vframe": ((64, 64, 20), (3.5, 3.5, 4.2)),
}


@pytest.mark.parametrize("name", READ)
def test_real_files_are_read_as_their_readme_says(name: str) -> None:
    modality, b = READ[name]
    image = read_image(shared(f"dicom/{name}") / "dicom", modality)
    size, spacing = GEOMETRY[name]
    assert image.volume.grid.size == size
    assert image.volume.grid.spacing_mm == pytest.approx(spacing, rel=1e-3)
    assert b is None or any(f"b = {b}" in note for note in image.notes[1:])


@pytest.mark.parametrize("name", ["siemens_xa30_classic_exam", "siemens_xa30_enhanced_trace_adc"])
def test_a_real_trace_of_b_2500_is_refused_by_name(name: str) -> None:
    with pytest.raises(InputRefused, match="no DWI series has a b-value") as refusal:
        read_image(shared(f"dicom/{name}") / "dicom", DWI)
    assert "b = 2500" in refusal.value.found
    if "classic" in name:
        assert "ColFA" in " ".join(read_image(shared(f"dicom/{name}") / "dicom", ADC).notes)


@pytest.mark.parametrize("name", READ)
def test_inspect_writes_what_dcm2niix_writes(tmp_path: Path, name: str) -> None:
    dcm2niix = pytest.importorskip("dcm2niix")
    modality, _ = READ[name]
    folder = shared(f"dicom/{name}") / "dicom"
    (tmp_path / "theirs").mkdir()
    subprocess.run(
        [dcm2niix.bin, "-p", "n", "-f", "%s", "-o", tmp_path / "theirs", folder], capture_output=True, check=False
    )
    assert main(["inspect", str(folder), "--as", modality.value, "--write", str(tmp_path / "ours.nii.gz")]) == 0
    ours = from_sitk(sitk.ReadImage(str(tmp_path / "ours.nii.gz"), sitk.sitkFloat64))
    theirs = [their_shell(path) for path in sorted((tmp_path / "theirs").glob("*.nii"))]
    theirs = [volume for volume in theirs if volume is not None]
    expected = theirs[0]  # ADC has the lower series number
    if name == "canon_enhanced":
        expected = Volume(expected.array, replace(expected.grid, spacing_mm=(*expected.grid.spacing_mm[:2], 3.0)))
    same_in_the_world(ours, expected, tolerance=1e-6 * float(expected.array.max()))


def their_shell(path: Path) -> Volume | None:
    """dcm2niix's volumes of the b-value nearest to 1000, averaged geometrically; None for colours."""
    image = sitk.ReadImage(str(path))
    if image.GetNumberOfComponentsPerPixel() > 1:
        return None
    if image.GetDimension() == 3:
        return from_sitk(sitk.Cast(image, sitk.sitkFloat64))
    b_values = np.loadtxt(path.with_suffix(".bval")).ravel()
    nearest = min(b_values[b_values >= 500], key=lambda b: abs(b - 1000))
    shell = [
        from_sitk(sitk.Cast(image[:, :, :, int(n)], sitk.sitkFloat64))
        for n in np.flatnonzero(np.abs(b_values - nearest) <= 60)
    ]
    arrays = np.stack([volume.array for volume in shell])
    mean = np.exp(np.log(np.maximum(arrays, 1e-6)).mean(axis=0))
    return Volume(np.where((arrays <= 0).any(axis=0), 0, mean), shell[0].grid)


FORMS: dict[str, Callable[[Volume, Path, dict[str, object]], object]] = {
    "classic": lambda volume, folder, words: write_series(volume, folder, **words),  # type: ignore[arg-type]
    "Enhanced": lambda volume, folder, words: write_enhanced(
        [(words.pop("b", None), volume)], folder / "1.dcm", **words
    ),  # type: ignore[arg-type,list-item]
    "mosaic": lambda volume, folder, words: write_mosaic(volume, folder / "1.IMA", **words),  # type: ignore[arg-type]
    "tiles": lambda volume, folder, words: write_tiles(volume, folder / "1.dcm", **words),  # type: ignore[arg-type]
}


def of_scanner(volume: Volume) -> Volume:
    """An image as a scanner would have it: integers on a right-handed grid."""
    direction = np.reshape(volume.grid.direction, (3, 3))
    array = np.clip(np.round(volume.array), -32768, 32767).astype(np.float32)
    if np.linalg.det(direction) > 0:
        return Volume(array, volume.grid)
    last = volume.grid.affine[:3] @ (0, 0, volume.grid.size[2] - 1, 1)
    matrix = direction * (1, 1, -1)
    return Volume(
        array[::-1], replace(volume.grid, origin_mm=tuple(last.tolist()), direction=tuple(matrix.ravel().tolist()))
    )


def sample_images() -> dict[Modality, Volume]:
    return {modality: from_sitk(image) for modality, image in odd.sample().images.items()}


def isles_images() -> dict[Modality, Volume]:
    folder = shared("cases/isles22_0009")
    images = {m: from_sitk(sitk.ReadImage(str(folder / f"{m}.nii.gz"), sitk.sitkFloat32)) for m in (DWI, ADC)}
    return images | {ADC: images[ADC].like(images[ADC].array * 1000)}


def mask_of(files: dict[Modality, Path]) -> tuple[dict[Modality, Volume], Volume]:
    """The images as read, and the mask of a member that decides voxel by voxel."""
    raw = read_case_files("case", files)
    ensemble = Ensemble(
        RunConfig(), InferenceSettings(), (MemberSpec("rule", "nnunet", Path("/nowhere")),), (odd.Rule("rule"),), 0.0
    )
    return {m: image.volume for m, image in raw.images.items()}, segment_raw(raw, ensemble, LogWatcher()).fused.mask


@pytest.mark.slow
@pytest.mark.parametrize("images", [sample_images, isles_images], ids=["sample", "isles22_0009"])
def test_every_form_of_dicom_gives_the_mask_of_its_nifti_form(
    tmp_path: Path, images: Callable[[], dict[Modality, Volume]]
) -> None:
    volumes = {modality: of_scanner(volume) for modality, volume in images().items()}
    nifti = {}
    for modality, volume in images().items():
        nifti[modality] = tmp_path / f"{modality}.nii.gz"
        sitk.WriteImage(to_sitk(volume.like(np.clip(np.round(volume.array), -32768, 32767))), str(nifti[modality]))
    read, expected = mask_of(nifti)
    assert expected.array.sum() > 200
    for form, write in FORMS.items():
        for modality, volume in volumes.items():
            words = (
                {"description": "diff trace", "uid": "1", "b": 1000}
                if modality is DWI
                else {"description": "diff ADC", "uid": "2"}
            )
            write(volume, tmp_path / form / modality.value, words)
        images_read, mask = mask_of({modality: tmp_path / form / modality.value for modality in volumes})
        for modality in volumes:
            same_in_the_world(images_read[modality], read[modality], tolerance=0)
        same_in_the_world(mask, expected, tolerance=0)
