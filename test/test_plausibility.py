"""Images that are not what they are called."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ensemble.errors import InputRefused
from ensemble.prepare.plausibility import refuse_implausible, tissue_level
from ensemble.types import AnyArray, BoolArray


def head(lesion_share: float = 0.0) -> tuple[AnyArray, AnyArray, BoolArray]:
    """DWI, ADC and mask of a ball of tissue around CSF; the lesion is a cap of the ball, as bright and dark as lesions get."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, 48)] * 3, indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2)
    brain, csf = radius < 0.9, radius < 0.42
    lesion = brain & ~csf & (z > np.quantile(z[brain], 1 - lesion_share) if lesion_share else np.zeros_like(brain))
    draw = np.random.default_rng(1)
    noise = 1 + draw.normal(0, 0.1, (2, *brain.shape))
    dwi = brain * np.where(csf, 100.0, np.where(lesion, 2.0 * 300, 300.0)) * noise[0]
    adc = brain * np.where(csf, 3.0, np.where(lesion, 0.45 * 0.8, 0.8)) * noise[1]
    return dwi.astype(np.float32), adc.astype(np.float32), brain


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.35])
def test_no_infarct_is_taken_for_a_swap(share: float) -> None:
    dwi, adc, brain = head(share)
    assert refuse_implausible(dwi, adc, brain, "here") == ()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("gain", [1e-3, 1.0, 400.0])
def test_a_swap_is_found_in_any_unit(share: float, gain: float) -> None:
    dwi, adc, brain = head(share)
    with pytest.raises(InputRefused, match="swapped"):
        refuse_implausible(adc * gain, dwi, brain, "here")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d, a: (d * np.exp(a), a), "not diffusion-weighted"),
        (lambda d, a: (d, (np.exp(-a) * (a != 0)).astype(np.float32)), "not a map of diffusion coefficients"),
        (lambda d, a: (np.minimum(d, 310), a), "clipped"),
        (lambda d, a: (d * (np.arange(48) > 20), a), "DWI and ADC show different parts"),
        (lambda d, a: (d, a * (np.arange(48) > 20)), "DWI and ADC show different parts"),
    ],
)
def test_what_is_something_else_is_refused(
    spoil: Callable[[AnyArray, AnyArray], tuple[AnyArray, AnyArray]], message: str
) -> None:
    dwi, adc, brain = head(0.02)
    with pytest.raises(InputRefused, match=message) as refusal:
        refuse_implausible(*spoil(dwi, adc), brain, "here")
    assert refusal.value.where == "here"
    assert refusal.value.do


def test_a_little_clipping_and_emptiness_is_remarked_upon() -> None:
    dwi, adc, brain = head(0.1)
    notes = refuse_implausible(np.minimum(dwi, 550), np.where(np.arange(48) > 42, 0, adc), brain, "here")
    assert any("clipped" in note.text for note in notes), notes


def test_the_level_is_the_tissues() -> None:
    dwi, adc, brain = head(0.1)
    assert tissue_level(dwi, brain) == pytest.approx(300, rel=0.1)
    assert tissue_level(adc, brain) == pytest.approx(0.8, rel=0.1)
    assert tissue_level(np.zeros_like(dwi), brain) == 0.0
