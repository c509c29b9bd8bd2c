"""A predicted mask measured against the true one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.errors import InputRefused
from ensemble.evaluate.pairs import Pair
from ensemble.geometry import ROUNDING_VOXELS
from ensemble.metrics import detected_lesions, dice, lesion_f1, volume_ml
from ensemble.readers.integrity import remarks_or_refusal
from ensemble.readers.native import last_line
from ensemble.streams import native_stderr_to_log
from ensemble.volume import Volume, from_sitk

#: The measures of ISLES'22.
MEASURES = ("dice", "lesion_f1", "avd_ml", "alcd")


@dataclass(frozen=True)
class Score:
    """What the ISLES'22 measures say of one case."""

    case: str
    dice: float
    lesion_f1: float
    avd_ml: float
    """Absolute volume difference."""
    alcd: int
    """Absolute lesion count difference."""
    truth_ml: float
    predicted_ml: float
    truth_lesions: int
    predicted_lesions: int
    missed_lesions: int
    false_lesions: int
    lesions_ml: tuple[float, ...]
    """Volume of each true lesion."""
    lesions_found: tuple[bool, ...]
    """Whether any voxel of it is predicted."""


def score(pair: Pair) -> Score:
    """Measure one pair. Raises InputRefused when a mask is missing, ambiguous, unreadable or no mask, or when the grids differ."""
    truth, prediction = _only_two(pair)
    true, predicted = read_mask(truth, "true mask"), read_mask(prediction, "predicted mask")
    if not true.grid.distance_voxels(predicted.grid) <= ROUNDING_VOXELS:
        raise InputRefused(
            "the two masks lie on different grids",
            where=prediction,
            found=f"predicted {predicted.grid.size} at {_mm(predicted)}, true {true.grid.size} at {_mm(true)}; places"
            f" {true.grid.distance_voxels(predicted.grid):.3g} voxels apart",
            do="evaluate on the grid of the true mask; masks are not resampled here",
        )
    return measure(pair.case, true.array, predicted.array, true.grid.spacing_zyx_mm)


def measure(case: str, truth: np.ndarray, prediction: np.ndarray, spacing_zyx_mm: tuple[float, float, float]) -> Score:
    """Measure two bool masks (z, y, x) of one shape."""
    voxels, found = detected_lesions(truth, prediction)
    predicted_voxels, confirmed = detected_lesions(prediction, truth)
    true_ml, predicted_ml = volume_ml(truth, spacing_zyx_mm), volume_ml(prediction, spacing_zyx_mm)
    return Score(
        case=case,
        dice=dice(truth, prediction),
        lesion_f1=lesion_f1(truth, prediction),
        avd_ml=abs(true_ml - predicted_ml),
        alcd=abs(len(voxels) - len(predicted_voxels)),
        truth_ml=true_ml,
        predicted_ml=predicted_ml,
        truth_lesions=len(voxels),
        predicted_lesions=len(predicted_voxels),
        missed_lesions=int((~found).sum()),
        false_lesions=int((~confirmed).sum()),
        lesions_ml=tuple((voxels * np.prod(spacing_zyx_mm) / 1000.0).tolist()),
        lesions_found=tuple(found.tolist()),
    )


def read_mask(path: Path, label: str) -> Volume:
    """A mask file as bool. Raises InputRefused for what can't be read whole, or holds more than one value beside 0."""
    if not path.is_file():
        raise InputRefused(f"the {label} does not exist", where=path, do="check the path")
    remarks_or_refusal(path, label)
    try:
        with native_stderr_to_log():
            volume = from_sitk(_three_dimensional(sitk.ReadImage(str(path)), path, label))
    except RuntimeError as error:
        raise InputRefused(
            f"the {label} is not a readable image",
            where=path,
            found=last_line(error),
            do="copy or export it again",
        ) from error
    values = np.unique(volume.array)
    if len(values) > 2 or not np.isfinite(values).all() or (len(values) == 2 and values[0] != 0):
        raise InputRefused(
            f"the {label} is no mask",
            where=path,
            found=f"{len(values)} values between {values[0]:g} and {values[-1]:g}",
            do="give 0 outside the lesion and one other value inside",
        )
    return volume.like(volume.array != 0)


def _three_dimensional(image: sitk.Image, path: Path, label: str) -> sitk.Image:
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputRefused(f"the {label} is not a 3-D mask", where=path, found=f"size {image.GetSize()}", do="give one")
    return image


def _only_two(pair: Pair) -> tuple[Path, Path]:
    if not pair.predictions:
        raise InputRefused(
            f"case {pair.case} has no predicted mask",
            where=pair.truth[0],
            found=f"without a true mask: {', '.join(map(str, pair.others))}" if pair.others else "",
            do="give both the same name (or sub, ses and run), segment the case, or leave its true mask out",
        )
    if len(pair.truth) > 1 or len(pair.predictions) > 1:
        raise InputRefused(
            f"case {pair.case} has more than one {'true' if len(pair.truth) > 1 else 'predicted'} mask",
            found=f"true: {', '.join(map(str, pair.truth))}; predicted: {', '.join(map(str, pair.predictions))}",
            do="leave exactly one, or name them apart",
        )
    return pair.truth[0], pair.predictions[0]


def _mm(volume: Volume) -> str:
    return " x ".join(f"{mm:.4g}" for mm in volume.grid.spacing_mm) + " mm"
