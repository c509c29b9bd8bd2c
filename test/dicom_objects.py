"""A case at its end whose lesion is made up, on the grid of whatever was read; and what dicom3tools say of objects."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import MRImageStorage

from ensemble.config import RunConfig
from ensemble.families.base import InferenceSettings, MemberPrediction
from ensemble.families.spec import MemberSpec
from ensemble.fusion import fuse
from ensemble.metrics import lesion_count, volume_ml
from ensemble.outputs.segmented import SegmentedCase
from ensemble.pipeline import Ensemble, MemberOutcome, Result
from ensemble.prepare.case import PreparedCase
from ensemble.readers.base import RawCase, RawImage
from ensemble.readers.origin import DicomOrigin, SourceFrame, SourceSlice
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume

WEIGHTS = {"one": {"fold_0.pth": "a" * 64, "fold_1.pth": "b" * 64}}


def segmented(
    image: RawImage, *, seed: int = 0, empty: bool = False, weights: Mapping[str, Mapping[str, str]] = WEIGHTS
) -> SegmentedCase:
    """What became of a case whose DWI this image is: lesions at random, so that no flip of them looks like them."""
    volume = image.volume
    probability = volume.like(np.zeros(volume.array.shape, np.float32) if empty else _blobs(volume.array.shape, seed))
    prediction = MemberPrediction("one", probability, networks=1)
    images = {Modality.DWI: volume, Modality.ADC: volume}
    normal = volume.like(np.ones(volume.array.shape, np.float32))
    brain = volume.like(np.ones(volume.array.shape, bool))
    case = PreparedCase("case of Doe^Jane", images, images, dict.fromkeys(images, normal), brain, ())
    fused = fuse({"one": probability}, "majority")
    mask = fused.mask.array
    result = Result(
        case,
        (MemberOutcome("one", "voted", prediction=prediction),),
        fused,
        volume_ml(mask, volume.grid.spacing_zyx_mm),
        lesion_count(mask),
    )
    raw = RawCase("case of Doe^Jane", {Modality.DWI: image, Modality.ADC: replace(image)})
    spec = MemberSpec("one", "nnunet", Path("/nowhere"))
    return SegmentedCase(raw, result, Ensemble(RunConfig(), InferenceSettings(), (spec,), (), 0.0, weights))


def origin_of(volume: Volume) -> DicomOrigin:
    """The origin of a volume, as if it had been read from classic DICOM."""
    study, axes = Dataset(), np.reshape(volume.grid.direction, (3, 3)).T
    study.StudyInstanceUID, study.FrameOfReferenceUID = "1.2.3", "1.2.3.9"
    slices = tuple(
        SourceSlice(
            tuple((volume.grid.affine[:3] @ (0, 0, z, 1)).tolist()),
            (SourceFrame(MRImageStorage, f"1.2.3.1.{z + 1}", "1.2.3.1", None),),
        )
        for z in range(len(volume.array))
    )
    across, down, _ = volume.grid.spacing_mm
    return DicomOrigin(study, tuple(axes[:2].ravel().tolist()), (down, across), slices)


def _blobs(shape: tuple[int, ...], seed: int) -> AnyArray:
    """Probabilities: noise, with a few boxes above a half; one in the first and one in the last slice."""
    generator = np.random.default_rng(seed)
    array = generator.uniform(0, 0.4, shape).astype(np.float32)
    for z in (0, shape[0] // 2, shape[0] - 1):
        y, x = (int(generator.integers(1, n - 6)) for n in shape[1:])
        array[z, y : y + 2 + z % 3, x : x + 4] = 0.75
    return array


def dciodvfy(path: Path) -> list[str]:
    """The errors that dicom3tools' verifier finds in a file; the test is skipped, saying so, where it is not installed."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed (apt-get install dicom3tools)")
    done = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace", check=False)
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]
