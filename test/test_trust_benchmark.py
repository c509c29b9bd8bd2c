"""What the trust score is made and measured by: spoilt images, patients on one side only, and the measures themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.trust import aurc, auroc, excess_aurc
from conftest import phantom_case
from ensemble.types import Modality
from training.anatomy import HELD_OUT_HEADS, TRAINING_HEADS
from training.corruptions import CALIBRATION_KINDS, CORRUPTIONS, STRENGTHS, corrupted
from training.trust import fit_dice
from training.trust_patients import (
    MEASURED_HEADS,
    REFERENCE_SEED,
    SPOILT_HEADS,
    reference_patients,
    spoilt_for_calibration,
    spoilt_for_measurement,
    validation_patients,
)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_fault_changes_images_the_more_the_stronger_it_is(kind: str) -> None:
    raw, sizes = phantom_case(flair=True), []
    adc = raw.images[Modality.ADC]
    scaled = replace(adc, volume=adc.volume.like(adc.volume.array / 1000))  # as the simulator has it
    raw = replace(raw, images={**raw.images, Modality.ADC: scaled})
    before = {modality: image.volume.array.copy() for modality, image in raw.images.items()}
    for strength in STRENGTHS:
        spoilt = corrupted(raw, kind, strength, seed=1)
        for modality, image in raw.images.items():
            array = spoilt.images[modality].volume.array
            assert np.array_equal(image.volume.array, before[modality])  # the patient is not changed
            assert array.shape == image.volume.array.shape
            assert np.isfinite(array).all()
            assert array.min() >= 0
        sizes.append(
            sum(
                float(np.abs(spoilt.images[m].volume.array - before[m]).mean() / before[m].mean())
                for m in (Modality.DWI, Modality.ADC)
            )
        )
    assert min(sizes) > 0
    if kind not in ("other_anatomy", "high_b"):  # another thing at each strength; noise in place of signal
        assert sizes == sorted(sizes)
    again = corrupted(raw, kind, 2, seed=1)
    assert np.array_equal(again.images[Modality.DWI].volume.array, spoilt.images[Modality.DWI].volume.array)


def test_nobody_is_on_two_sides() -> None:
    validation, references = validation_patients(150), reference_patients(60)
    assert {patient.seed for patient in validation}.isdisjoint(patient.seed for patient in references)
    assert min(patient.seed for patient in references) == REFERENCE_SEED
    assert {patient.head for patient in validation} == set(HELD_OUT_HEADS)
    assert set(HELD_OUT_HEADS).isdisjoint(TRAINING_HEADS)
    assert set(SPOILT_HEADS).isdisjoint(MEASURED_HEADS)
    learnt, measured = spoilt_for_calibration(45), spoilt_for_measurement(20)
    assert {patient.head for patient in learnt} == set(SPOILT_HEADS)
    assert {patient.head for patient in measured} == set(MEASURED_HEADS)
    assert {patient.kind for patient in learnt} == set(CALIBRATION_KINDS)
    assert len({patient.name for patient in measured}) == len(measured) == 20 * 12 * 3
    assert 0.2 < np.mean([not patient.flair for patient in validation]) < 0.3
    by_name = {patient.name: patient for patient in validation}
    assert all(by_name[p.name.removesuffix(f"_{p.kind}_{p.strength}")].flair == p.flair for p in learnt)


def test_the_area_under_the_risk_coverage_curve() -> None:
    risk = np.array([0.0, 0.0, 1.0, 1.0])
    assert aurc(np.array([4.0, 3.0, 2.0, 1.0]), risk) == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert excess_aurc(np.array([4.0, 3.0, 2.0, 1.0]), risk) == 0
    assert aurc(np.zeros(4), risk) == pytest.approx(0.5)  # nothing known: the mean risk
    assert excess_aurc(np.array([1.0, 2.0, 3.0, 4.0]), risk) > 0.5


def test_the_area_under_the_receiver_operating_curve() -> None:
    assert auroc(np.array([1.0, 2.0, 3.0]), np.array([False, False, True])) == 1
    assert auroc(np.array([1.0, 1.0]), np.array([False, True])) == 0.5
    assert np.isnan(auroc(np.array([1.0]), np.array([True])))


def test_slopes_are_found_and_none_has_the_wrong_sign() -> None:
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(400, 3))
    dice = 1 / (1 + np.exp(-(0.3 + 0.8 * inputs[:, 0] + 0.5 * inputs[:, 1] + 0.6 * inputs[:, 2])))
    intercept, slopes = fit_dice(inputs, dice, ["agreement", "probability", "spectral"])
    assert slopes[:2] == pytest.approx([0.8, 0.5], abs=0.2)
    assert slopes[2] == pytest.approx(0, abs=1e-6)  # distance can't speak for a mask
    assert intercept == pytest.approx(0.3, abs=0.15)
