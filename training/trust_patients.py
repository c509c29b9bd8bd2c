"""Simulate and segment patients for the trust score, and cache the results.

References are new patients with the heads (label maps) on which the networks were trained. Calibration and test use the four heads that
were kept out of the last trainings, one head at a time: the calibration for a test patient uses neither the patient's head nor seed.
"Usual" therefore means the simulator's anatomy, physics and faults, including heads that the references do not contain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemble.errors import InputRefused
from ensemble.metrics import dice, lesion_f1, volume_ml
from ensemble.pipeline import Ensemble, Result, segment_raw
from ensemble.progress import SilentWatcher
from ensemble.trust.evidence import CaseEvidence, gather_evidence
from ensemble.types import Modality
from training.acquisition import Acquired
from training.anatomy import HELD_OUT_HEADS
from training.corruptions import CALIBRATION_KINDS, CORRUPTIONS, STRENGTHS, corrupted
from training.drafts import draft_of
from training.draw import Draw
from training.evaluate import Truth, as_raw
from training.simulate import SHARED, VALIDATION_SEED, simulate, validation_case

REFERENCE_SEED = 700_000
#: Heads of the patients whose images are spoilt for the calibration, and for the test.
SPOILT_HEADS, MEASURED_HEADS = (4, 9), (14, 19)
#: Every third patient has no lesion, and every fourth no FLAIR.
LESION_FREE_EVERY, WITHOUT_FLAIR_EVERY = 3, 4


@dataclass(frozen=True)
class Patient:
    """The description of a simulated patient, from which the images are made on demand."""

    name: str
    seed: int
    """The seed for `training.simulate`; seeds from VALIDATION_SEED on belong to the validation set."""
    flair: bool = True
    kind: str = ""
    """The fault of the images, a row of `training.corruptions.CORRUPTIONS`; empty for clean images."""
    strength: int = 0

    @property
    def head(self) -> int:
        """The label map of a patient of the validation set."""
        return head_of(self.seed)

    def spoilt(self, kind: str, strength: int) -> Patient:
        """Return the same patient with spoilt images."""
        return replace(self, name=f"{self.name}_{kind}_{strength}", kind=kind, strength=strength)

    def truth(self, shared: Path, caches: Sequence[Path]) -> Truth:
        """Return the images and the true mask; simulate them if no folder has them, and store them in the first folder."""
        case = self._simulated(shared, caches)
        raw = as_raw(self.name, case)
        if not self.flair:
            raw = replace(raw, images={m: image for m, image in raw.images.items() if m is not Modality.FLAIR})
        if self.kind:
            raw = corrupted(raw, self.kind, self.strength, self.seed)
        return Truth(raw, case.lesion.numpy() > 0)

    def _simulated(self, shared: Path, caches: Sequence[Path]) -> Acquired:
        validation = self.seed >= VALIDATION_SEED
        number = self.seed - (VALIDATION_SEED if validation else REFERENCE_SEED)
        name = f"{'simulated' if validation else 'reference'}_{number:03d}.pt"
        for folder in caches:
            if (folder / name).exists():
                return Acquired(**torch.load(folder / name, weights_only=True))
        case = (
            validation_case(number, shared)
            if validation
            else simulate(self.seed, shared, lesion_free=number % LESION_FREE_EVERY == 2)
        )
        caches[0].mkdir(parents=True, exist_ok=True)
        with draft_of(caches[0] / name) as draft:
            torch.save(vars(case), draft)
        return case


def reference_patients(number: int) -> list[Patient]:
    """Return the patients for the references."""
    return [Patient(f"reference_{at:03d}", REFERENCE_SEED + at, _has_flair(at)) for at in range(number)]


def validation_patients(number: int) -> list[Patient]:
    """Return the first patients of the validation set, for calibration and test (never both at once)."""
    chosen = islice(count(VALIDATION_SEED), number)
    seeds = sorted(chosen, key=lambda seed: head_of(seed) in MEASURED_HEADS)
    heads = [head_of(seed) in MEASURED_HEADS for seed in seeds]
    first = heads.count(False)
    made = [
        Patient(f"simulated_{seed - VALIDATION_SEED:03d}", seed, _has_flair(at - first if measured else at))
        for at, (seed, measured) in enumerate(zip(seeds, heads, strict=True))
    ]
    return sorted(made, key=lambda patient: patient.seed)


def spoilt_for_calibration(number: int) -> list[Patient]:
    """Return the first patients with `SPOILT_HEADS`, each with one fault of the `CALIBRATION_KINDS` in turn."""
    plan = [(kind, strength) for strength in STRENGTHS for kind in CALIBRATION_KINDS]
    patients = [patient for patient in validation_patients(4 * number) if patient.head in SPOILT_HEADS][:number]
    return [patient.spoilt(*plan[at % len(plan)]) for at, patient in enumerate(patients)]


def spoilt_for_measurement(number: int) -> list[Patient]:
    """Return the first patients with `MEASURED_HEADS` and a lesion, each with every kind and strength of fault."""
    patients = [
        patient
        for patient in validation_patients(6 * number)
        if patient.head in MEASURED_HEADS and (patient.seed - VALIDATION_SEED) % LESION_FREE_EVERY != 2
    ]
    return [
        patient.spoilt(kind, strength)
        for patient in patients[:number]
        for kind in CORRUPTIONS
        for strength in STRENGTHS
    ]


@cache
def head_of(seed: int) -> int:
    """Return the label map of a patient of the validation set (the first thing that `training.simulate` draws)."""
    return Draw(seed).choice(HELD_OUT_HEADS)


def _has_flair(at: int) -> bool:
    return at % WITHOUT_FLAIR_EVERY != WITHOUT_FLAIR_EVERY - 1


@dataclass(frozen=True)
class SegmentedPatient:
    """The measurements of one segmented patient, as they are cached."""

    name: str
    evidence: CaseEvidence | None
    """None if the images were refused."""
    dice: float
    """1 for an empty mask of a patient without a lesion; nan without a mask or a true mask."""
    lesion_f1: float
    truth_ml: float
    refused: str = ""
    """Why the input checks refuse the images. If there is evidence all the same, the checks were skipped for the measurement."""
    cpu_seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return a form that can be written as JSON."""
        told = dict(vars(self))
        if self.evidence is not None:
            told["evidence"] = {
                key: {name: np.asarray(value).tolist() for name, value in part.items()}
                if isinstance(part, dict)
                else part
                for key, part in vars(self.evidence).items()
            }
        return told

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> SegmentedPatient:
        """Read the form written by `as_json`."""
        if (found := told["evidence"]) is not None:
            arrays: dict[str, Any] = {
                key: {name: np.asarray(value, np.float32) for name, value in found[key].items()}
                for key in ("whole", "lesion", "intensities")
            }
            numbers = {key: found[key] for key in ("mask", "quality", "surroundings")}
            told = told | {"evidence": CaseEvidence(agreement=found["agreement"], **numbers, **arrays)}
        return cls(**told)


def segmented_patient(truth: Truth, result: Result, cpu_seconds: float = 0.0) -> SegmentedPatient:
    """Return the measurements of a segmented patient."""
    mask, spacing = result.mask.array, result.case.grid.spacing_zyx_mm
    measured = (float("nan"),) * 3
    if truth.mask is not None:
        measured = dice(truth.mask, mask), lesion_f1(truth.mask, mask), volume_ml(truth.mask, spacing)
    return SegmentedPatient(truth.raw.name, gather_evidence(result), *measured, cpu_seconds=cpu_seconds)


def weights_digest(ensemble: Ensemble) -> str:
    """Return a short digest of all weights, for the name of a folder of what they made."""
    return hashlib.sha256(json.dumps(ensemble.digests, sort_keys=True, default=dict).encode()).hexdigest()[:12]


class Collection:
    """Segmented patients for certain weights, cached in a folder."""

    def __init__(self, ensemble: Ensemble, folder: Path, shared: Path = SHARED, caches: Sequence[Path] = ()) -> None:
        self._ensemble, self._shared = ensemble, shared
        self._caches = (folder / "cases", *caches)
        self._folder = folder / f"seen_{weights_digest(ensemble)}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Return the cache file of a patient."""
        return self._folder / f"{name}.json"

    def of(self, patients: Sequence[Patient]) -> Iterator[SegmentedPatient]:
        """Yield each patient, segmented unless the cache has it."""
        for patient in patients:
            yield self.get(patient.name) or self.put(self._segmented(patient))

    def get(self, name: str) -> SegmentedPatient | None:
        """Return a cached patient, or None."""
        path = self.path(name)
        return SegmentedPatient.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def put(self, seen: SegmentedPatient) -> SegmentedPatient:
        """Store a patient in the cache."""
        with draft_of(self.path(seen.name)) as draft:
            draft.write_text(json.dumps(seen.as_json()), encoding="utf-8")
        return seen

    def _segmented(self, patient: Patient) -> SegmentedPatient:
        truth = patient.truth(self._shared, self._caches)
        try:
            return segmented_patient(truth, segment_raw(truth.raw, self._ensemble, SilentWatcher()))
        except InputRefused as refused:
            return SegmentedPatient(
                patient.name, None, *(float("nan"),) * 3, refused=f"{refused.what}: {refused.found}"
            )
