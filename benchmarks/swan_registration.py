"""What the way FLAIR comes onto the DWI grid does to SWAN's mask, against the FLAIR that DeepISLES' Elastix registered.

    python -m benchmarks.swan_registration [--shared ../shared] [--threads 1]

Runs the golden weights (small networks, trained on this very case; folds 0 and 1) on isles22_0009 with FLAIR by its header, registered
rigidly as `--registration auto` does, the same with cubic B-splines, as recorded, and, where itk-elastix is installed
(`pip install itk-elastix`), registered by it with the recorded parameter maps. Needs `../shared`. Masks are compared with that of the
recorded FLAIR and with the true one; voxels within the brain. One case says what differs, not what is better.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import SimpleITK as sitk
import torch

from ensemble.families.base import InferenceSettings
from ensemble.families.spec import MemberSpec
from ensemble.families.swan.member import SwanMember
from ensemble.metrics import dice
from ensemble.prepare.case import PreparedCase, prepare_raw
from ensemble.prepare.registration import register_rigidly
from ensemble.readers.imagefile import read_case_files
from ensemble.resample import resample_volume
from ensemble.types import BoolArray, FloatArray, Modality, ignore_progress
from ensemble.volume import Volume, from_sitk, to_sitk

CASE = "isles22_0009"
WEIGHTS = "golden/swan/weights/FACTORIZER/logs/isles2022_dwi-adc-flair"
DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR


def main() -> None:
    parser = argparse.ArgumentParser(description="FLAIR's registration and SWAN's mask")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.shared / "cases" / CASE
    raw = read_case_files(CASE, {modality: folder / f"{modality}.nii.gz" for modality in Modality})
    case = prepare_raw(raw, registration="never")
    recorded = _read(options.shared / f"golden/swan/inputs/flair_registered_{CASE}.nii.gz")
    truth = _read(folder / "lesion_gt.nii.gz").array > 0
    brain, dwi = case.brain.array, case.as_read[DWI]
    flair = raw.images[FLAIR].volume
    by_header = resample_volume(flair, dwi.grid)
    found = register_rigidly(flair, by_header, dwi, brain)
    print(f"rigid: {found.summary}")
    ways = {"recorded (Elastix: affine, B-spline; cubic)": recorded, "by header, linear": by_header}
    if found.transform is not None:
        ways["rigid, linear"] = resample_volume(flair, dwi.grid, transform=found.transform)
        ways["rigid, cubic"] = _cubic(flair, dwi, found.transform)
    ways["by header, cubic"] = _cubic(flair, dwi, sitk.Transform())
    ways |= _elastix(
        flair, dwi, options.shared / "golden/swan/registration/default_parameter_maps.json", options.threads
    )
    member = SwanMember.load(MemberSpec("swan", "swan", options.shared / WEIGHTS), InferenceSettings())
    reference = None
    for name, volume in ways.items():
        mask = _mask(member, case, volume)
        reference = mask if reference is None else reference
        print(
            f"{name}: not 0 in {(volume.array != 0).mean():.0%}; correlation in the brain"
            f" {_correlation(volume.array[brain], recorded.array[brain]):.4f}; {mask.sum()} voxels,"
            f" Dice {dice(mask, reference):.3f} to the recorded FLAIR's mask ({(mask != reference).sum()} voxels differ),"
            f" {dice(mask, truth):.3f} to the truth",
            flush=True,
        )


def _mask(member: SwanMember, case: PreparedCase, flair: Volume) -> BoolArray:
    changed = replace(case, as_read={**case.as_read, FLAIR: flair})
    mask: BoolArray = member.predict(changed, InferenceSettings(), ignore_progress).mask.array
    return mask


def _cubic(flair: Volume, dwi: Volume, transform: sitk.Transform) -> Volume:
    moving = to_sitk(flair.like(flair.array.astype(np.float32)))
    return Volume(from_sitk(sitk.Resample(moving, to_sitk(dwi), transform, sitk.sitkBSpline, 0.0)).array, dwi.grid)


def _elastix(flair: Volume, dwi: Volume, maps: Path, threads: int) -> dict[str, Volume]:
    """FLAIR registered by itk-elastix with DeepISLES' parameter maps; nothing where it is not installed."""
    if importlib.util.find_spec("itk") is None:
        print("itk-elastix is not installed: left out")
        return {}
    import itk

    parameters = itk.ParameterObject.New()
    for stage in json.loads(maps.read_text()):
        parameters.AddParameterMap(stage)
    started = time.process_time()
    fixed, moving = _to_itk(itk, dwi), _to_itk(itk, flair)
    result, _ = itk.elastix_registration_method(
        fixed, moving, parameter_object=parameters, number_of_threads=threads, log_to_console=False
    )
    print(f"itk-elastix: {time.process_time() - started:.0f} CPU s")
    return {"itk-elastix, the recorded parameter maps": dwi.like(np.asarray(itk.array_from_image(result), np.float32))}


def _to_itk(itk: ModuleType, volume: Volume) -> object:
    sitk_image = to_sitk(volume)
    image = itk.image_from_array(np.ascontiguousarray(volume.array, np.float32))
    image.SetSpacing(sitk_image.GetSpacing())
    image.SetOrigin(sitk_image.GetOrigin())
    image.SetDirection(np.reshape(sitk_image.GetDirection(), (3, 3)))
    return image


def _correlation(one: FloatArray, other: FloatArray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def _read(path: Path) -> Volume:
    return from_sitk(sitk.ReadImage(str(path), sitk.sitkFloat32))


if __name__ == "__main__":
    main()
