"""A b0 or T2 image in the place of a DWI is found from the images alone; no DWI is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import SHARED, shared
from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.prepare import skull
from ensemble.prepare.case import prepare_raw
from ensemble.prepare.plausibility import refuse_implausible
from ensemble.readers.base import RawCase, RawImage
from ensemble.readers.imagefile import read_case_files
from ensemble.types import AnyArray, BoolArray, Modality
from ensemble.volume import Volume

DWI, ADC = Modality.DWI, Modality.ADC
GRID = Grid((56, 64, 40), (3.0, 3.0, 4.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
NO_DWI = "not diffusion-weighted"


def brain(csf_share: float = 0.05, lesion_share: float = 0.0) -> tuple[AnyArray, AnyArray, BoolArray]:
    """Share of CSF (0-1, blurred), log of the ADC's factor in a lesion, and mask of an ellipsoid with ventricles."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in GRID.shape_zyx], indexing="ij")
    inside = (x / 0.9) ** 2 + (y / 0.92) ** 2 + (z / 0.9) ** 2 < 1
    radius = (x / 0.5) ** 2 + (y / 0.9) ** 2 + (z / 0.6) ** 2
    edge = float(np.quantile(radius[inside], csf_share))
    csf = np.clip(0.5 + 4 * (edge - radius) / max(edge, 0.05), 0, 1) if csf_share else np.zeros_like(radius)
    lesion = x > np.quantile(x[inside], 1 - lesion_share) if lesion_share else np.zeros_like(inside)
    return csf, np.where(lesion & (csf < 0.5), np.log(0.5), 0.0), inside


def scanned(
    b: float,
    te_ms: float = 85,
    *,
    csf_share: float = 0.05,
    lesion_share: float = 0.0,
    noise: float = 0.04,
    given_b: float | None = None,
) -> tuple[AnyArray, AnyArray, BoolArray]:
    """An image of b = `given_b` (default: b) and the ADC map that b0 and b give, with noise."""
    csf, log_adc, inside = brain(csf_share, lesion_share)
    draw = np.random.default_rng(3)
    adc = 0.8 * np.exp(log_adc + 0.05 * draw.standard_normal(inside.shape))
    tissue = 0.75 * 0.95 * np.exp(-te_ms / (80 * (1 - 0.3 * log_adc)))
    water = 0.7 * np.exp(-te_ms / 1200)

    def signal(b: float) -> AnyArray:
        clean = (1 - csf) * tissue * np.exp(-b * 1e-3 * adc) + csf * water * np.exp(-b * 3e-3)
        sigma = noise * float(np.median(tissue * np.exp(-b * 0.8e-3)))
        return np.hypot(clean + sigma * draw.standard_normal(clean.shape), sigma * draw.standard_normal(clean.shape))

    b0, weighted = signal(0), signal(b)
    measured = np.log(b0 / weighted) / (b * 1e-3)
    given = weighted if given_b is None else signal(given_b)
    return (1000 * given * inside).astype(np.float32), (1000 * measured.clip(0) * inside).astype(np.float32), inside


def with_scalp(dwi: AnyArray, adc: AnyArray, inside: BoolArray, fat: float) -> tuple[AnyArray, AnyArray]:
    """Fat of so many times the tissue's brightness around the brain, in air that is 0."""
    from scipy import ndimage

    distance = ndimage.distance_transform_edt(~inside, GRID.spacing_zyx_mm)
    scalp = (distance > 4) & (distance < 14)
    level = float(np.median(dwi[inside]))
    return np.where(scalp, fat * level, dwi).astype(np.float32), np.where(scalp, 300, adc).astype(np.float32)


@pytest.mark.parametrize("te_ms", [60, 85, 110])
@pytest.mark.parametrize("csf_share", [0.004, 0.03, 0.12])
@pytest.mark.parametrize("lesion_share", [0.0, 0.2])
def test_a_b0_in_the_place_of_a_dwi(te_ms: float, csf_share: float, lesion_share: float) -> None:
    image, adc, inside = scanned(1000, te_ms, csf_share=csf_share, lesion_share=lesion_share, given_b=0)
    with pytest.raises(InputRefused, match=NO_DWI) as refusal:
        refuse_implausible(image, adc, inside, "here")
    assert "b about 1000" in refusal.value.do


@pytest.mark.slow
@pytest.mark.parametrize("b", [500, 700, 1000, 2000])
@pytest.mark.parametrize("te_ms", [60, 85, 110])
@pytest.mark.parametrize("csf_share", [0.0, 0.004, 0.03, 0.12])
@pytest.mark.parametrize("lesion_share", [0.0, 0.2])
@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_no_dwi_is_taken_for_a_b0(b: float, te_ms: float, csf_share: float, lesion_share: float, noise: float) -> None:
    if b > 1000 and lesion_share and csf_share < 0.01:
        pytest.skip("240 ml of infarct in a brain without CSF looks like swapped images")
    image, adc, inside = scanned(b, te_ms, csf_share=csf_share, lesion_share=lesion_share, noise=noise)
    refuse_implausible(image, adc, inside, "here")


@pytest.mark.parametrize("fat", [0.1, 1.0, 3.0])
def test_a_b0_with_its_skull_that_looks_extracted(monkeypatch: pytest.MonkeyPatch, fat: float) -> None:
    """The brain's mask is then the whole head; fat says nothing of diffusion, and the core of the head does."""
    monkeypatch.setattr(skull, "_signs_of_a_skull", lambda dwi: "")
    for given_b, refused in ((0, True), (1000, False)):
        image, adc, inside = scanned(1000, given_b=given_b)
        raw = case(*with_scalp(image, adc, inside, fat))
        if refused:
            with pytest.raises(InputRefused, match=NO_DWI):
                prepare_raw(raw, brain_ml=(300.0, 5000.0))
        else:
            prepare_raw(raw, brain_ml=(300.0, 5000.0))


def case(dwi: AnyArray, adc: AnyArray) -> RawCase:
    images = {DWI: dwi, ADC: adc}
    return RawCase("one", {m: RawImage(Path(f"{m}.mha"), Volume(array, GRID)) for m, array in images.items()})


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("gain", [1e-3, 1.0, 1e4])
def test_units_and_gain_do_not_matter(unit: float, gain: float) -> None:
    image, adc, inside = scanned(1000, given_b=0)
    with pytest.raises(InputRefused, match=NO_DWI):
        refuse_implausible(image * np.float32(gain), adc * np.float32(unit), inside, "here")


@pytest.mark.parametrize(("change", "seen"), [(lambda i: i[:20], True), (lambda i: i[20:], True)])
def test_half_a_brain_is_enough(change: Callable[[AnyArray], AnyArray], seen: bool) -> None:
    image, adc, inside = (change(array) for array in scanned(1000, given_b=0))
    with pytest.raises(InputRefused, match=NO_DWI):
        refuse_implausible(image, adc, inside, "here")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["canon_b1500", "philips_a", "siemens_supine_b", "uih_a"])
def test_real_b0_images_are_refused_and_their_dwi_is_not(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With the foreground's core in the place of HD-BET's brain, which takes minutes."""
    folder = shared(f"normals/{name}")

    def deep(dwi: Volume, device: str) -> BoolArray:
        from scipy import ndimage

        from ensemble.prepare.brain import above_background

        head = ndimage.binary_fill_holes(above_background(dwi.array))
        return np.asarray(ndimage.distance_transform_edt(head, dwi.grid.spacing_zyx_mm) > 28)

    monkeypatch.setattr(skull, "_brain_probability", deep)
    prepare_raw(
        read_case_files(name, {DWI: folder / "dwi.nii.gz", ADC: folder / "adc.nii.gz"}), brain_ml=(100.0, 2500.0)
    )
    with pytest.raises(InputRefused, match=NO_DWI):
        prepare_raw(
            read_case_files(name, {DWI: folder / "b0.nii.gz", ADC: folder / "adc.nii.gz"}), brain_ml=(100.0, 2500.0)
        )


@pytest.mark.slow
def test_a_few_simulated_patients() -> None:
    """`python -m benchmarks.unweighted` asks this of a hundred."""
    shared("anatomy")
    from benchmarks.unweighted import FIRST_SEED, scan, verdict

    one = scan(FIRST_SEED + 2, SHARED)
    assert not verdict(one, "dwi")
    assert NO_DWI in verdict(one, "b0")
    assert NO_DWI in verdict(one, "t2")
    assert verdict(replace(one, images={"dwi": one.images["b0"]}), "dwi")
