"""Make the references and the calibration of the trust score: `python -m training.trust`.

Segments simulated patients without mirroring, fits the references on some and the calibration on others, and writes
`model_weights/trust/`. Segmented patients are cached in `.train/trust`, so an interrupted call continues. New weights need a new call.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares

from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.memory import keep_freed_memory
from ensemble.pipeline import Ensemble, load_from_config
from ensemble.trust.calibration import (
    INPUTS,
    Calibration,
    UsualRange,
    atypicality,
    atypicality_limits,
    conformal_quantile,
    expit,
    transform_score,
)
from ensemble.trust.reference import References, fit_references, write_references
from ensemble.trust.scores import DIRECTIONS, compute_trust_scores
from ensemble.types import AnyArray
from training.command import call
from training.simulate import SHARED
from training.trust_patients import (
    VALIDATION_SEED,
    Collection,
    Patient,
    SegmentedPatient,
    head_of,
    reference_patients,
    spoilt_for_calibration,
    validation_patients,
)

log = logging.getLogger(f"ensemble.{__name__}")

FOLDER = Path(".train/trust")
REFERENCES, CALIBRATIONS, SPOILT = 60, 120, 45
#: Ridge penalty on the slopes, for inputs of unit spread.
RIDGE = 0.05


def usable(seen: Sequence[SegmentedPatient]) -> list[SegmentedPatient]:
    """Return the patients whose images were not refused."""
    return [one for one in seen if one.evidence is not None and not one.refused]


def design(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> AnyArray:
    """Return the inputs (n, len(names)) of the expected Dice."""
    return np.array([[transform_score(name, scores[name]) for name in names] for scores in rows])


def fit_dice(inputs: AnyArray, dice: AnyArray, names: Sequence[str]) -> tuple[float, AnyArray]:
    """Fit intercept and slopes of the expected Dice by least squares; each slope is 0 or has the sign of its score."""
    middle, spread = inputs.mean(axis=0), np.maximum(inputs.std(axis=0), 1e-6)
    unit = (inputs - middle) / spread
    low = [-np.inf, *(0.0 if DIRECTIONS[name] > 0 else -np.inf for name in names)]
    high = [np.inf, *(np.inf if DIRECTIONS[name] > 0 else 1e-12 for name in names)]

    def residuals(x: AnyArray) -> AnyArray:
        off = 1 / (1 + np.exp(-(x[0] + unit @ x[1:]))) - dice
        return np.concatenate([off, (RIDGE * len(dice)) ** 0.5 * 0.2 * x[1:]])

    start = np.array([0.5, *(0.1 * DIRECTIONS[name] for name in names)])
    found = least_squares(residuals, start, bounds=(low, high)).x
    slopes = found[1:] / spread
    return float(found[0] - slopes @ middle), slopes


def calibrate(
    ensemble: Ensemble,
    references: References,
    clean: Sequence[SegmentedPatient],
    spoilt: Sequence[SegmentedPatient],
    names: Sequence[str],
) -> Calibration:
    """Fit the expected Dice, its interval and all limits on patients with clean images, and the slopes also on spoilt images."""
    patients = [*usable(clean), *usable(spoilt)]
    rows = [compute_trust_scores(one.evidence, references) for one in patients if one.evidence is not None]
    with_mask = np.array([row["volume_ml"] > 0 for row in rows])
    is_clean = np.arange(len(rows)) < len(usable(clean))
    inputs = design([row for row, there in zip(rows, with_mask, strict=True) if there], names)
    dice = np.array([one.dice for one in patients])[with_mask]
    # the Dice expected of a patient is fitted on patients with other heads
    heads = np.array([head_of_name(one.name) for one in patients])[with_mask]
    out_of_fold = np.empty(len(dice))
    for head in set(heads):
        intercept, slopes = fit_dice(inputs[heads != head], dice[heads != head], names)
        out_of_fold[heads == head] = intercept + inputs[heads == head] @ slopes
    intercept, slopes = fit_dice(inputs, dice, names)
    usual = is_clean[with_mask]
    expected = np.array([expit(x) for x in out_of_fold])
    far = [atypicality(row) for row, clean_one in zip(rows, is_clean, strict=True) if clean_one]
    about = {
        "made": time.strftime("%Y-%m-%d"),
        "calibration_patients": int(is_clean.sum()),
        "of_these_with_a_mask": int(usual.sum()),
        "with_spoilt_images": int((~is_clean).sum()),
        "heads": sorted({head_of_name(one.name) for one in patients}),
    }
    return Calibration(
        {name: dict(digests) for name, digests in ensemble.digests.items()},
        intercept,
        dict(zip(names, map(float, slopes), strict=True)),
        float(np.mean([one.dice for one, there in zip(patients, with_mask, strict=True) if not there] or [1.0])),
        conformal_quantile(np.abs(expected - dice)[usual]),
        atypicality_limits(far),
        UsualRange.of(list(-out_of_fold[usual])),
        about,
    )


def head_of_name(name: str) -> int:
    """Return the label map (head) of a patient of the validation set, given the name."""
    return head_of(VALIDATION_SEED + int(name.split("_")[1]))


def collected(collection: Collection, what: str, patients: Sequence[Patient]) -> list[SegmentedPatient]:
    """Segment patients, or read them from the cache, and log the progress."""
    found = []
    for number, seen in enumerate(collection.of(patients), start=1):
        found.append(seen)
        if number % 10 == 0 or number == len(patients):
            log.info("%s: %d of %d", what, number, len(patients))
    return found


@dataclass(frozen=True)
class CalibrationData:
    """The references and segmented patients from which an ensemble is calibrated."""

    ensemble: Ensemble
    references: References
    clean: Sequence[SegmentedPatient]
    spoilt: Sequence[SegmentedPatient]

    @classmethod
    def of(cls, ensemble: Ensemble, collection: Collection, sizes: tuple[int, int, int]) -> CalibrationData:
        """Segment patients; `sizes` are the numbers for references, for calibration, and for calibration with spoilt images."""
        reference, calibration, spoilt = sizes
        normal = usable(collected(collection, "references", reference_patients(reference)))
        clean = collected(collection, "calibration", validation_patients(calibration))
        wrong = collected(collection, "spoilt", spoilt_for_calibration(spoilt))
        evidence = [one.evidence for one in normal if one.evidence is not None]
        return cls(ensemble, fit_references(evidence, ensemble.digests), clean, wrong)

    def calibration(self, without: int | None = None) -> Calibration:
        """Calibrate on all patients, or on all but those with one head."""
        clean, spoilt = (
            [one for one in part if head_of_name(one.name) != without] for part in (self.clean, self.spoilt)
        )
        return calibrate(self.ensemble, self.references, clean, spoilt, list(INPUTS))


def described(references: References, calibration: Calibration) -> list[str]:
    """Return a summary for the log."""
    lines = []
    for name, member in references.members.items():
        for part, cloud in (("whole brain", member.whole), ("lesion", member.lesion)):
            if cloud is not None:
                spectrum = cloud.spectrum
                size = f"N = {spectrum.n}, D = {len(spectrum.mean)}, K(N) = {spectrum.modes}"
                lines.append(f"{name}, {part}: {size}, usual distance {cloud.usual:.2f}")
    slopes = ", ".join(f"{name} {slope:+.3f}" for name, slope in calibration.slopes.items())
    lines.append(f"logit of the expected Dice: {calibration.intercept:+.3f}; {slopes}; +- {calibration.residual:.2f}")
    lines.append(f"limits: looks {calibration.looks}, Dice {calibration.dice}; {calibration.about}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Make references and calibration, log a summary, and write the files."""
    parser = argparse.ArgumentParser(
        prog="python -m training.trust", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with anatomy/ and lesions/")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="cache of segmented patients (default: %(default)s)"
    )
    parser.add_argument("--cache", type=Path, help="another folder with simulated validation cases (only read)")
    parser.add_argument("--references", type=int, default=REFERENCES, help="patients (default: %(default)s)")
    parser.add_argument("--calibration", type=int, default=CALIBRATIONS, help="patients (default: %(default)s)")
    parser.add_argument(
        "--spoilt",
        type=int,
        default=SPOILT,
        help="number of these that are added with spoilt images (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    return call(lambda: _make(options))


def open_ensemble(weights: Path) -> Ensemble:
    """Load the members as the patients are segmented: without mirroring, on the CPU, with features."""
    return load_from_config(RunConfig(weights=weights, device="cpu", tta="none", trust=True))


def _make(options: Any) -> int:
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    ensemble = open_ensemble(options.weights)
    caches = (options.cache,) if options.cache else ()
    collection = Collection(ensemble, options.folder, options.shared, caches)
    sizes = options.references, options.calibration, options.spoilt
    data = CalibrationData.of(ensemble, collection, sizes)
    calibration = data.calibration()
    for line in described(data.references, calibration):
        log.info("%s", line)
    write_references(data.references, calibration.as_json(), options.weights)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
