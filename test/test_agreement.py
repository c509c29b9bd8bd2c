"""An ADC map that does not belong to its DWI is refused: it gave an empty mask, or one of another place, and exit code 0."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

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


@pytest.mark.parametrize("b", [500, 1000, 2000])
@pytest.mark.parametrize("csf_share", [0.0, 0.05])
@pytest.mark.parametrize("lesion_share", [0.0, 0.2])
@pytest.mark.parametrize("noise", [0.02, 0.15])
def test_an_adc_of_this_dwi(b: float, csf_share: float, lesion_share: float, noise: float) -> None:
    dwi, adc, inside = scanned(b, csf_share=csf_share, lesion_share=lesion_share, noise=noise)
    ask(dwi, adc, inside)
    if csf_share:  # else there is nothing but noise to go by
        ask(dwi, np.roll(adc, 1, 2), inside)
    ask(dwi, np.round(adc * 50), inside)
    ask(dwi[:9], adc[:9], inside[:9])


def test_a_mask_in_the_place_of_the_adc_is_refused() -> None:
    """In 1e-3 mm^2/s, 1 is a usual ADC: it was taken, and the mask was empty."""
    for value in (1.0, 800.0):
        raw = spoilt(phantom_case(), Modality.ADC, lambda array, value=value: array.__setitem__(array > 0, value))
        with pytest.raises(InputRefused):
            prepare_raw(raw)
