"""Images that are not what they are called."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ensemble.errors import InputRefused
from ensemble.prepare.brain import brain_mask
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


def slicewise(factors: AnyArray, axis: int) -> AnyArray:
    return np.expand_dims(factors.astype(np.float32), tuple({0, 1, 2} - {axis}))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("of_dwi", [True, False])
@pytest.mark.parametrize(
    "factors",
    [1.0 + np.arange(48) % 2, np.exp(0.5 * np.random.default_rng(0).standard_normal(48))],
    ids=["by turns", "any"],
)
def test_slices_that_are_not_scaled_alike_are_refused(factors: AnyArray, of_dwi: bool, axis: int) -> None:
    """Each slice of its own scale, as where a converter forgets the slices' rescale slopes: bright ones were all lesion."""
    dwi, adc, brain = head(0.02)
    image = dwi if of_dwi else adc
    image *= slicewise(factors, axis)
    with pytest.raises(InputRefused, match=f"slices of the {'DWI' if of_dwi else 'ADC'} image are not scaled alike"):
        refuse_implausible(dwi, adc, brain, "here")


def test_slices_that_disturb_each_other_are_remarked_upon() -> None:
    dwi, adc, brain = head(0.02)
    (note,) = refuse_implausible(dwi * slicewise(1 + 0.15 * (np.arange(48) % 2), 0), adc, brain, "here")
    assert "by a factor of 1.15" in note.text


@pytest.mark.parametrize(
    ("lost", "axis"), [("DWI", 0), ("DWI", 1), ("DWI", 2), ("ADC", 0), ("ADC", 1), ("ADC", 2), ("DWI, ADC", 0)]
)
@pytest.mark.parametrize("left", [0.0, 1e-3])
def test_a_slice_that_is_lost_within_the_brain_is_refused(left: float, lost: str, axis: int) -> None:
    """A lesion in it was not segmented, and nothing said so."""
    dwi, adc, _ = head()
    gone = slicewise(np.where(np.arange(48) == 20, left, 1.0), axis)
    dwi, adc = dwi * (gone if "DWI" in lost else 1), adc * (gone if "ADC" in lost else 1)
    with pytest.raises(InputRefused, match="empty slices within the brain") as refusal:
        refuse_implausible(dwi, adc, brain_mask(dwi, adc), "here")
    assert "slice 21 of 48" in refusal.value.found


def test_a_dwi_without_contrast_is_remarked_upon() -> None:
    """Logarithms in the place of the scanner's values gave an empty mask."""
    dwi, adc, brain = head(0.02)
    (note,) = refuse_implausible(np.log1p(dwi), adc, brain, "here")
    assert "not logarithms" in note.text


def test_slices_that_are_empty_at_an_end_and_halves_that_part_are_none_lost() -> None:
    dwi, adc, brain = head()
    adc[:6] = 0
    refuse_implausible(dwi, adc, brain, "here")
    parted = np.arange(48) != 24
    refuse_implausible(dwi * parted, adc * parted, brain & parted, "here")


def test_a_little_clipping_and_emptiness_is_remarked_upon() -> None:
    dwi, adc, brain = head(0.1)
    notes = refuse_implausible(np.minimum(dwi, 550), np.where(np.arange(48) > 42, 0, adc), brain, "here")
    assert any("clipped" in note.text for note in notes), notes


def test_the_level_is_the_tissues() -> None:
    dwi, adc, brain = head(0.1)
    assert tissue_level(dwi, brain) == pytest.approx(300, rel=0.1)
    assert tissue_level(adc, brain) == pytest.approx(0.8, rel=0.1)
    assert tissue_level(np.zeros_like(dwi), brain) == 0.0
