"""The ISLES'22 measures, against examples counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble.metrics import (
    absolute_lesion_count_difference,
    absolute_volume_difference_ml,
    dice,
    lesion_count,
    lesion_f1,
    volume_ml,
)

SPACING_ZYX_MM = (5.0, 2.0, 1.0)


def mask(*voxels: tuple[int, int, int]) -> np.ndarray:
    array = np.zeros((6, 6, 6), dtype=bool)
    for voxel in voxels:
        array[voxel] = True
    return array


EMPTY = mask()
ONE, OTHER = mask((0, 0, 0)), mask((5, 5, 5))
BAR = mask((0, 0, 0), (0, 0, 1), (0, 0, 2))


@pytest.mark.parametrize(
    ("truth", "prediction", "expected"),
    [
        (EMPTY, EMPTY, 1.0),
        (EMPTY, ONE, 0.0),
        (ONE, EMPTY, 0.0),
        (ONE, ONE, 1.0),
        (ONE, OTHER, 0.0),
        (BAR, ONE, 2 * 1 / (3 + 1)),
    ],
)
def test_dice(truth: np.ndarray, prediction: np.ndarray, expected: float) -> None:
    assert dice(truth, prediction) == pytest.approx(expected)
    assert dice(prediction, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("truth", "prediction", "expected"),
    [
        (EMPTY, EMPTY, 1.0),
        (EMPTY, ONE, 0.0),
        (ONE, EMPTY, 0.0),
        (BAR, ONE, 1.0),  # touching is finding
        (ONE | OTHER, ONE, 2 / 3),  # one found, one missed
        (ONE, ONE | OTHER, 2 / 3),  # one found, one false
        (mask((0, 0, 0), (0, 0, 2)), BAR, 1.0),  # one prediction may find two lesions
        (ONE | mask((0, 5, 0)), OTHER | ONE | mask((3, 0, 3)), 2 * 1 / (2 * 1 + 2 + 1)),
    ],
)
def test_lesion_f1(truth: np.ndarray, prediction: np.ndarray, expected: float) -> None:
    assert lesion_f1(truth, prediction) == pytest.approx(expected)


def test_lesions_are_26_connected() -> None:
    assert lesion_count(mask((0, 0, 0), (1, 1, 1))) == 1
    assert lesion_count(mask((0, 0, 0), (2, 2, 2))) == 2


def test_volume_and_differences() -> None:
    assert volume_ml(BAR, SPACING_ZYX_MM) == pytest.approx(0.03)
    assert absolute_volume_difference_ml(ONE, BAR, SPACING_ZYX_MM) == pytest.approx(0.02)
    assert absolute_volume_difference_ml(BAR, ONE, SPACING_ZYX_MM) == pytest.approx(0.02)
    assert absolute_lesion_count_difference(ONE | OTHER, EMPTY) == 2
    assert absolute_lesion_count_difference(EMPTY, ONE | OTHER) == 2
