"""Simulated patients for the trust score, and what each shows once it is segmented: kept in a folder, so that nothing is done twice.

References are of the heads that the networks were trained on (their patients were not); calibration and test of the four heads that were
kept out of their last trainings, a head at a time: who is measured is of a head, and has a seed, that his calibration has not seen.
"Usual" thus means: the
simulator's anatomy, physics and faults; a head that the references don't know is part of it.
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
from ensemble.pipeline import Ensemble, Result, segment
from ensemble.progress import SilentWatcher
from ensemble.trust.evidence import Evidence, gather_evidence
from ensemble.types import Modality
from training.acquisition import Acquired
from training.anatomy import HELD_OUT_HEADS
from training.corruptions import CORRUPTIONS, SEEN, STRENGTHS, corrupted
from training.draw import Draw
from training.evaluate import Truth, as_raw
from training.simulate import SHARED, VALIDATION_SEED, simulate, validation_case

REFERENCE_SEED = 700_000
#: Of the former, some patients' images are spoilt for the calibration, of the latter for the measurement.
SPOILT_HEADS, MEASURED_HEADS = (4, 9), (14, 19)
#: Every so many-th patient has no lesion, and no FLAIR.
LESION_FREE_EVERY, WITHOUT_FLAIR_EVERY = 3, 4


@dataclass(frozen=True)
class Patient:
    """A simulated patient, before anybody is simulated."""

    name: str
    seed: int
    """Of `training.simulate`; of the validation set from VALIDATION_SEED on."""
    flair: bool = True
    kind: str = ""
    """What is wrong with the images: a row of `training.corruptions.CORRUPTIONS`; empty for nothing."""
    strength: int = 0

    @property
    def head(self) -> int:
        """Whose label map a patient of the validation set has."""
        return head_of(self.seed)

    def spoilt(self, kind: str, strength: int) -> Patient:
        """The same patient, with images that are wrong."""
        return replace(self, name=f"{self.name}_{kind}_{strength}", kind=kind, strength=strength)

    def truth(self, shared: Path, caches: Sequence[Path]) -> Truth:
        """The images and the true mask; simulated where none of the folders has the patient, and kept in the first."""
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
        torch.save(vars(case), caches[0] / f"{name}.part")
        (caches[0] / f"{name}.part").rename(caches[0] / name)
        return case


def reference_patients(number: int) -> list[Patient]:
    """Of whom the references are made."""
    return [Patient(f"reference_{at:03d}", REFERENCE_SEED + at, _has_flair(at)) for at in range(number)]


def validation_patients(number: int) -> list[Patient]:
    """The first patients of the validation set: they calibrate, and on them it is measured, never both at once."""
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
    """The first such patients, one fault each, of the kinds that calibration sees, in turn."""
    plan = [(kind, strength) for strength in STRENGTHS for kind in SEEN]
    patients = [patient for patient in validation_patients(4 * number) if patient.head in SPOILT_HEADS][:number]
    return [patient.spoilt(*plan[at % len(plan)]) for at, patient in enumerate(patients)]


def spoilt_for_measurement(number: int) -> list[Patient]:
    """The first such patients with a lesion, each in every way and strength."""
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
    """The label map of a patient of the validation set (the first thing that `training.simulate` draws)."""
    return Draw(seed).choice(HELD_OUT_HEADS)


def _has_flair(at: int) -> bool:
    return at % WITHOUT_FLAIR_EVERY != WITHOUT_FLAIR_EVERY - 1


@dataclass(frozen=True)
class Seen:
    """One patient, segmented."""

    name: str
    evidence: Evidence | None
    """None where the images were refused."""
    dice: float
    """1 of an empty mask where there is no lesion; nan where there is no mask, or no truth."""
    lesion_f1: float
    truth_ml: float
    refused: str = ""
    """Why the product's checks refuse the images; with evidence, they were passed over for the measurement."""
    cpu_seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON."""
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
    def from_json(cls, told: dict[str, Any]) -> Seen:
        """What `as_json` gave."""
        if (found := told["evidence"]) is not None:
            arrays: dict[str, Any] = {
                key: {name: np.asarray(value, np.float32) for name, value in found[key].items()}
                for key in ("whole", "lesion", "intensities")
            }
            numbers = {key: found[key] for key in ("mask", "quality", "surroundings")}
            told = told | {"evidence": Evidence(agreement=found["agreement"], **numbers, **arrays)}
        return cls(**told)


def seen_of(truth: Truth, result: Result, cpu_seconds: float = 0.0) -> Seen:
    """What is kept of a segmented patient."""
    mask, spacing = result.mask.array, result.case.grid.spacing_zyx_mm
    measured = (float("nan"),) * 3
    if truth.mask is not None:
        measured = dice(truth.mask, mask), lesion_f1(truth.mask, mask), volume_ml(truth.mask, spacing)
    return Seen(truth.raw.name, gather_evidence(result), *measured, cpu_seconds=cpu_seconds)


class Collection:
    """What patients show under some weights, in a folder."""

    def __init__(self, ensemble: Ensemble, folder: Path, shared: Path = SHARED, caches: Sequence[Path] = ()) -> None:
        digest = hashlib.sha256(json.dumps(ensemble.digests, sort_keys=True, default=dict).encode()).hexdigest()[:12]
        self._ensemble, self._shared = ensemble, shared
        self._caches = (folder / "cases", *caches)
        self._folder = folder / f"seen_{digest}"
        self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where it is kept."""
        return self._folder / f"{name}.json"

    def of(self, patients: Sequence[Patient]) -> Iterator[Seen]:
        """What each shows, segmented where that is not known yet."""
        for patient in patients:
            yield self.get(patient.name) or self.put(self._segmented(patient))

    def get(self, name: str) -> Seen | None:
        """What is known of a patient."""
        path = self.path(name)
        return Seen.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def put(self, seen: Seen) -> Seen:
        """Keep it."""
        part = self.path(seen.name).with_suffix(".part")
        part.write_text(json.dumps(seen.as_json()), encoding="utf-8")
        part.rename(self.path(seen.name))
        return seen

    def _segmented(self, patient: Patient) -> Seen:
        truth = patient.truth(self._shared, self._caches)
        try:
            return seen_of(truth, segment(truth.raw, self._ensemble, SilentWatcher()))
        except InputRefused as refused:
            return Seen(patient.name, None, *(float("nan"),) * 3, refused=f"{refused.what}: {refused.found}")
