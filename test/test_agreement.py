"""An ADC map that does not belong to its DWI is refused: it gave an empty mask, or one of another place, and exit code 0."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from conftest import phantom_case
from ensemble.errors import InputRefused
from ensemble.prepare.agreement import refuse_unrelated
from ensemble.prepare.case import prepare_raw
from ensemble.types import AnyArray, BoolArray, Modality
from test_hot_voxels import spoilt
from test_unweighted import GRID, scanned

DRAW = np.random.default_rng(0)


def whole() -> tuple[AnyArray, AnyArray, BoolArray]:
    """A brain with CSF and an infarct on one side."""
    dwi, adc, inside = scanned(1000, lesion_share=0.05)
    return dwi, 1000 * adc, inside


def ask(dwi: AnyArray, adc: AnyArray, inside: BoolArray) -> None:
    refuse_unrelated(dwi, adc, inside, GRID.spacing_zyx_mm, "here")


@pytest.mark.parametrize(
    "change",
    [
        lambda adc, inside: inside * 1.0,
        lambda adc, inside: inside * (800 + 20 * DRAW.standard_normal(adc.shape)),
        lambda adc, inside: inside * DRAW.uniform(100, 1500, adc.shape),
        lambda adc, inside: inside * DRAW.permutation(adc.ravel()).reshape(adc.shape),
    ],
    ids=["a mask", "a plain map with noise", "noise", "its voxels in any order"],
)
def test_an_adc_that_tells_nothing_of_the_dwi(change: Callable[[AnyArray, BoolArray], AnyArray]) -> None:
    dwi, adc, inside = whole()
    with pytest.raises(InputRefused, match="do not belong together"):
        ask(dwi, change(adc, inside).astype(np.float32), inside)


MOVES: dict[str, Callable[[AnyArray], AnyArray]] = {
    "left is right": lambda adc: adc[:, :, ::-1],
    "front is back": lambda adc: adc[:, ::-1],
    "upside down": lambda adc: adc[::-1],
    "turned": lambda adc: adc[:, ::-1, ::-1],
    "to the side": lambda adc: np.roll(adc, 3, 2),
    "two ways": lambda adc: np.roll(adc, (2, 4), (1, 2)),
    "up": lambda adc: np.roll(adc, 2, 0),
    "slices interleaved": lambda adc: np.concatenate([adc[::2], adc[1::2]]),
}


@pytest.mark.parametrize("how", MOVES)
def test_an_adc_that_lies_elsewhere_than_its_header_says(how: str) -> None:
    dwi, adc, inside = whole()
    with pytest.raises(InputRefused, match="mirrored or displaced|do not belong together"):
        ask(dwi, MOVES[how](adc), inside & (MOVES[how](adc) > 0))


def patient(seed: int) -> tuple[AnyArray, AnyArray, BoolArray]:
    """A head as others have it, left like right, and its own folds in it; 2 mm."""
    draw = np.random.default_rng(seed)
    shape = (24, 40, 40)
    folds = [gaussian_filter(each.standard_normal(shape), 1.5) for each in (np.random.default_rng(99), draw)]
    alike = folds[0] + folds[0][:, :, ::-1]
    water = alike / alike.std() + 1.5 * folds[1] / folds[1].std()
    inside = sum(((np.arange(n) - n / 2 + 0.5) / (n / 2)).reshape(s) ** 2 for n, s in SIDES) < 0.8
    adc = np.where(inside, 900 + 150 * water, 0)
    dwi = np.where(inside, 1000 * np.exp(-adc / 1000) * (1 + 0.05 * draw.standard_normal(shape)), 0)
    return dwi, adc, inside


SIDES = ((24, (-1, 1, 1)), (40, (1, -1, 1)), (40, (1, 1, -1)))


def test_the_adc_of_another_head_in_the_same_place() -> None:
    """As in a data set of registered images: it gave a mask of neither patient, and exit code 0."""
    (dwi, adc, inside), (_, other, _) = patient(1), patient(3)
    refuse_unrelated(dwi, adc, inside, (2, 2, 2), "here")
    with pytest.raises(InputRefused, match="do not belong together") as refused:
        refuse_unrelated(dwi, other, inside, (2, 2, 2), "here")
    assert "as between two heads" in refused.value.found


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_adc_that_is_a_voxel_off_is_remarked_upon(axis: int) -> None:
    """As where the first slice is missing: 2 mm are less than what is refused, but more than a small lesion bears."""
    dwi, adc, inside = patient(1)
    assert refuse_unrelated(dwi, adc, inside, (2, 2, 2), "here") == ()
    (note,) = refuse_unrelated(dwi, np.roll(adc, 1, axis), inside, (2, 2, 2), "here")
    assert f"better moved by -2 mm along {'zyx'[axis]}" in note.text


@pytest.mark.parametrize("b", [500, 1000, 2000])
@pytest.mark.parametrize("csf_share", [0.0, 0.05])
@pytest.mark.parametrize("lesion_share", [0.0, 0.2])
@pytest.mark.parametrize("noise", [0.02, 0.15])
def test_an_adc_of_this_dwi(b: float, csf_share: float, lesion_share: float, noise: float) -> None:
    dwi, adc, inside = scanned(b, csf_share=csf_share, lesion_share=lesion_share, noise=noise)
    ask(dwi, adc, inside)
    if csf_share and noise < 0.1:  # else there is nothing but noise to go by
        ask(dwi, np.roll(adc, 1, 2), inside)
    ask(dwi, np.round(adc * 50), inside)
    ask(dwi[:9], adc[:9], inside[:9])


def test_a_mask_in_the_place_of_the_adc_is_refused() -> None:
    """In 1e-3 mm^2/s, 1 is a usual ADC: it was taken, and the mask was empty."""
    for value in (1.0, 800.0):
        raw = spoilt(phantom_case(), Modality.ADC, lambda array, value=value: array.__setitem__(array > 0, value))
        with pytest.raises(InputRefused):
            prepare_raw(raw)
