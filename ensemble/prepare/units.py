"""Normalise intensities so that the same tissue has the same value for every scanner, coil gain and unit.

DWI is divided by the median of normal brain tissue, ADC by the mode of its histogram, FLAIR by the tissue median. Tissue is
where ADC lies near its mode: that leaves out cerebrospinal fluid, most of an infarct, and masked-out voxels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ensemble.errors import InputRefused
from ensemble.prepare.draft import DraftCase, StepResult
from ensemble.types import Modality

# Factor to 1e-3 mm^2/s for the units that ADC maps come in: mm^2/s, 1e-3 mm^2/s and 1e-6 mm^2/s.
ADC_UNIT_FACTORS = {"mm^2/s": 1e3, "1e-3 mm^2/s": 1.0, "1e-6 mm^2/s": 1e-3}
# Brain medians (CSF included) of any plausible patient; normal tissue is 0.7-0.9, CSF 3.0 (in 1e-3 mm^2/s).
PLAUSIBLE_MEDIAN_ADC = (0.3, 2.5)
TISSUE_ADC_RANGE = (0.3, 1.6)
# Least share of the brain in that range: large ventricles leave far more, a wrong factor or offset next to nothing. What would be taken
# for tissue there is none, and the mask would be empty.
MIN_TISSUE_SHARE = 0.25
TISSUE_HALF_WIDTH = 0.25  # of the ADC mode
CLIP = {Modality.DWI: (0.0, 8.0), Modality.ADC: (0.0, 5.0), Modality.FLAIR: (0.0, 5.0)}


def normalize_intensities(case: DraftCase) -> StepResult:
    """Divide each image by its level in normal tissue. Raises InputRefused if one has no plausible brain tissue."""
    arrays = {modality: volume.array for modality, volume in case.images.items()}
    try:
        normalized = normalize_by_tissue(
            arrays[Modality.DWI], arrays[Modality.ADC], arrays.get(Modality.FLAIR), case.brain
        )
    except InputRefused as error:  # arrays don't know their files
        error.where = str(case.paths[Modality(error.where.lower())])
        raise
    return replace(
        case, tissue_normalized={modality: case.dwi.like(array) for modality, array in normalized.items()}
    ), ()


def adc_unit_factor(adc: npt.NDArray[np.floating], brain: npt.NDArray[np.bool_]) -> float:
    """Return the factor that converts an ADC map to 1e-3 mm^2/s (= um^2/ms), found from its values in the brain.

    Args:
        adc: array (z, y, x) in mm^2/s, 1e-3 mm^2/s or 1e-6 mm^2/s.
        brain: boolean array (z, y, x).

    Raises:
        InputRefused: if no unit makes the brain's median plausible, or too little of the brain has values of tissue.
    """
    inside = adc[brain & (adc > 0)]
    median = float(np.median(inside)) if inside.size else 0.0
    low, high = PLAUSIBLE_MEDIAN_ADC
    for factor in ADC_UNIT_FACTORS.values():
        if low <= median * factor <= high:
            _refuse_without_tissue(inside * factor)
            return factor
    raise InputRefused(
        "the ADC map's values fit no usual unit",
        where="ADC",
        found=f"the median in the brain is {median:.3g}; {low:g} to {high:g} are accepted, in 1e-3 mm^2/s",
        do="give an ADC map in mm^2/s, 1e-3 mm^2/s or 1e-6 mm^2/s (about 0.0008, 0.8 or 800 in normal tissue); "
        "check that DWI and ADC are not swapped",
    )


def _refuse_without_tissue(adc_um2_per_ms: npt.NDArray[np.floating]) -> None:
    (low, high), share = TISSUE_ADC_RANGE, tissue_share(adc_um2_per_ms)
    if share < MIN_TISSUE_SHARE:
        raise InputRefused(
            "the ADC map has hardly any value of brain tissue",
            where="ADC",
            found=f"{share:.0%} of the brain lies between {low:g} and {high:g} (1e-3 mm^2/s), at least {MIN_TISSUE_SHARE:.0%} is expected; "
            f"the median is {float(np.median(adc_um2_per_ms)):.3g}",
            do="give the ADC map with its original values: a factor or an offset (rescale slope, intercept) seems to be wrong or missing",
        )


def tissue_share(adc_um2_per_ms: npt.NDArray[np.floating]) -> float:
    """Return the share of the brain's ADC values (n,) that tissue may have."""
    low, high = TISSUE_ADC_RANGE
    return float(((adc_um2_per_ms > low) & (adc_um2_per_ms < high)).mean())


def adc_mode(adc_um2_per_ms: npt.NDArray[np.floating], brain: npt.NDArray[np.bool_]) -> float:
    """Return the most frequent ADC of brain tissue, in 1e-3 mm^2/s (smoothed histogram with bins of 0.01)."""
    low, high = TISSUE_ADC_RANGE
    counts, edges = np.histogram(adc_um2_per_ms[brain], bins=round((high - low) / 0.01), range=(low, high))
    smooth = ndimage.gaussian_filter1d(counts.astype(float), 4.0)
    peak = int(smooth.argmax())
    return float((edges[peak] + edges[peak + 1]) / 2)


def normalize_by_tissue(
    dwi: npt.NDArray[np.floating],
    adc: npt.NDArray[np.floating],
    flair: npt.NDArray[np.floating] | None,
    brain: npt.NDArray[np.bool_],
) -> dict[Modality, npt.NDArray[np.float32]]:
    """Scale a case so that normal tissue is 1 in every modality; 0 outside the brain.

    Args:
        dwi, adc, flair: arrays (z, y, x) on one grid, in the files' own units; FLAIR may be None, and 0 outside its field of view.
        brain: boolean array (z, y, x).

    Returns:
        One float32 array (z, y, x) a modality, without unit, clipped to `CLIP`.

    Raises:
        InputRefused: if a modality holds no plausible brain tissue.
    """
    factor = adc_unit_factor(adc, brain)
    diffusion = np.asarray(adc, dtype=np.float32) * np.float32(factor)
    mode = adc_mode(diffusion, brain)
    tissue = brain & (np.abs(diffusion - mode) < TISSUE_HALF_WIDTH * mode)
    scaled = {
        Modality.DWI: np.asarray(dwi, dtype=np.float32) / _tissue_median(dwi, tissue, "DWI"),
        Modality.ADC: diffusion / mode,
    }
    if flair is not None:
        scaled[Modality.FLAIR] = np.asarray(flair, dtype=np.float32) / _tissue_median(
            flair, tissue & (flair > 0), "FLAIR"
        )
    return {m: np.where(brain, np.clip(image, *CLIP[m]), 0).astype(np.float32) for m, image in scaled.items()}


def _tissue_median(image: npt.NDArray[np.floating], tissue: npt.NDArray[np.bool_], name: str) -> np.float32:
    median = float(np.median(image[tissue])) if tissue.any() else 0.0
    if not np.isfinite(median) or median <= 0.0:
        raise InputRefused(
            f"{name} has no signal in brain tissue",
            where=name,
            found=f"its median is {median:.3g} where ADC shows normal tissue",
            do=f"give {name} and ADC of the same head, with correct headers",
        )
    return np.float32(median)
