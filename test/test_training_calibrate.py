"""Where members decide: chosen on patients, and written into the last layer's biases."""

from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np
import pytest

from ensemble.types import ignore_progress
from training.calibrate import Patient, Rule, choose_thresholds, shift, worth_of

NAMES = ("a", "b", "c")


def patients(levels: dict[str, float], number: int = 3) -> list[Patient]:
    """Noise below 0.1 everywhere; in the lesion each member says its level. The last patient has no lesion."""
    made = []
    for index in range(number):
        rng = np.random.default_rng(index)
        lesion = np.zeros((6, 12, 12), bool)
        lesion[2:4, 3:6, 3 : 5 + index] = index < number - 1
        said = {
            name: np.where(lesion, level, rng.uniform(0, 0.1, lesion.shape)).astype(np.float16)
            for name, level in levels.items()
        }
        made.append(Patient(lesion, said, voxel_ml=0.01))
    return made


def test_timid_members_decide_earlier() -> None:
    timid = patients({"a": 0.3, "b": 0.3, "c": 0.9})
    assert worth_of(timid, Rule(dict.fromkeys(NAMES, 0.5), 0.0)).recall == 0
    chosen = choose_thresholds(timid, 0.0)
    found = worth_of(timid, chosen)
    assert (found.dice, found.f1, found.recall, found.precision, found.false_share) == (1, 1, 1, 1, 0)
    assert 0.05 < min(chosen.thresholds.values()) < 0.3


def test_members_that_need_no_change_keep_half() -> None:
    assert choose_thresholds(patients(dict.fromkeys(NAMES, 0.9)), 0.0).thresholds == dict.fromkeys(NAMES, 0.5)


def test_a_mask_in_patients_without_a_lesion_is_not_bought() -> None:
    made = patients(dict.fromkeys(NAMES, 0.3))
    free = made[-1]
    bright = np.full(free.lesion.shape, 0.35, np.float16)
    made[-1] = Patient(free.lesion, dict.fromkeys(NAMES, bright), free.voxel_ml)
    assert worth_of(made, choose_thresholds(made, 0.0)).false_share == 0
    assert worth_of(made, Rule(dict.fromkeys(NAMES, 0.2), 0.0)).score < 0


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.6])
def test_half_stays_where_a_member_decides(tmp_path: Path, threshold: float) -> None:
    from conftest import phantom_case
    from ensemble.families.base import InferenceSettings
    from ensemble.families.registry import family_of
    from ensemble.members.manifest import find_members
    from ensemble.prepare.case import prepare_raw
    from nnunet_folders import FolderSpec, build_folder

    build_folder(tmp_path, FolderSpec(patch=(32, 48, 48), spacing_mm=(5.0, 4.0, 4.0)))
    (spec,) = find_members(tmp_path)
    case, settings = prepare_raw(phantom_case()), InferenceSettings(tta="none")

    def probability() -> np.ndarray:
        array: np.ndarray = (
            family_of(spec).load(spec, settings).predict(case, settings, ignore_progress).probability.array
        )
        return array.astype(np.float64)

    before = probability()
    for checkpoint in tmp_path.rglob("checkpoint_final.pth"):
        shift(checkpoint, threshold)
    after = probability()
    inside = (before > 1e-3) & (before < 1 - 1e-3)
    odds = np.log(before[inside] / (1 - before[inside])) + log((1 - threshold) / threshold)
    assert inside.sum() > 100
    np.testing.assert_allclose(after[inside], 1 / (1 + np.exp(-odds)), atol=2e-3)
