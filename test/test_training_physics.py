"""Known parameters in, known signal out."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import ndimage

from training.acquisition import soften, to_voxels
from training.anatomy import blur
from training.artefacts import displace, ghost, rim_gain, susceptibility_shift
from training.draw import Draw
from training.lesions import HIGHEST_T2, NOMINAL_TE_MS, NORMAL_ADC, NORMAL_T2_MS, Damage, t2_for
from training.signals import (
    FlairProtocol,
    adc_from_signals,
    diffusion_attenuation,
    inversion_recovery,
    rician,
    spin_echo,
)
from training.tissues import TISSUES, ParameterMaps, Tissue


def uniform_maps(density: float = 0.8, t1: float = 1000.0, t2: float = 80.0, adc: float = 0.8) -> ParameterMaps:
    return ParameterMaps(*(torch.full((4, 4, 4), value) for value in (density, t1, t2, adc)))


def test_spin_echo_at_te_equal_t2_and_tr_equal_t1() -> None:
    signal = spin_echo(uniform_maps(0.5, 900, 70), te_ms=70, tr_ms=900)
    assert signal[0, 0, 0] == pytest.approx(0.5 * (1 - math.exp(-1)) * math.exp(-1), rel=1e-5)


def test_diffusion_attenuation_of_tissue_and_fluid() -> None:
    attenuation = diffusion_attenuation(torch.tensor([0.0, 0.8, 3.0]), 1000)
    assert attenuation.tolist() == pytest.approx([1.0, math.exp(-0.8), math.exp(-3.0)], rel=1e-5)


def test_flair_nulls_fluid_at_its_inversion_time() -> None:
    t1, tr = 4300.0, 9000.0
    null = t1 * math.log(2 / (1 + math.exp(-tr / t1)))
    protocol = FlairProtocol(te_ms=100, tr_ms=tr, ti_ms=null)
    csf = inversion_recovery(uniform_maps(1.0, t1, 1500), protocol)
    white = inversion_recovery(uniform_maps(0.7, 1000, 72), protocol)
    assert csf.max() < 1e-4
    assert white.min() > 0.1


@pytest.mark.parametrize("b", [500.0, 1000.0, 1500.0])
def test_adc_comes_back_from_noise_free_signals(b: float) -> None:
    maps = uniform_maps(adc=0.73)
    b0 = spin_echo(maps, 85, 5000)
    assert torch.allclose(adc_from_signals(b0, b0 * diffusion_attenuation(maps.adc, b), b), maps.adc, atol=1e-4)


def test_adc_of_no_signal_is_finite() -> None:
    assert torch.isfinite(adc_from_signals(torch.zeros(3), torch.tensor([0.0, 1.0, 2.0]), 1000)).all()


def test_rician_noise_has_its_floor_and_its_spread() -> None:
    draw, sigma = Draw(5), 0.3
    floor = rician(torch.zeros(60, 60, 60), sigma, draw)
    assert float(floor.mean()) == pytest.approx(sigma * math.sqrt(math.pi / 2), rel=0.01)
    strong = rician(torch.full((60, 60, 60), 30.0), sigma, draw)
    assert float(strong.std()) == pytest.approx(sigma, rel=0.02)
    averaged = rician(torch.full((60, 60, 60), 30.0), sigma, draw, averages=4)
    assert float(averaged.std()) == pytest.approx(sigma / 2, rel=0.02)


def test_displacement_moves_and_conserves_signal() -> None:
    image = torch.zeros(1, 3, 20, 3)
    image[0, 1, 8, 1] = 2.0
    moved = displace(image, torch.full((3, 20, 3), 3.25))
    assert moved[0, 1, 11, 1] == pytest.approx(1.5)
    assert moved[0, 1, 12, 1] == pytest.approx(0.5)
    assert float(moved.sum()) == pytest.approx(2.0)


def test_pile_up_is_a_gain_that_adc_does_not_see() -> None:
    maps = ParameterMaps(*(torch.full((2, 30, 2), value) for value in (0.8, 1000.0, 80.0, 0.8)))
    b0 = spin_echo(maps, 85, 5000)
    dwi = b0 * diffusion_attenuation(maps.adc, 1000)
    squeeze = (15.0 - torch.arange(30.0)).clamp(-5, 5).view(1, 30, 1).expand(2, 30, 2)  # 11 rows meet in one
    images = displace(torch.stack([b0, dwi]), squeeze)
    adc = adc_from_signals(images[0], images[1], 1000)
    assert images[1].max() > 5 * dwi.max()
    assert torch.allclose(adc[images[0] > 1e-3], torch.tensor(0.8), atol=1e-3)


def test_susceptibility_is_strongest_at_the_skull_base_and_nearly_symmetric() -> None:
    mask = torch.ones(60, 80, 60)
    shifts = torch.stack([susceptibility_shift(mask, Draw(seed)).abs() for seed in range(8)]).mean(0)
    assert shifts[:15].mean() > 2 * shifts[-15:].mean()
    left, right = shifts[:15, :, :30].mean(), shifts[:15, :, 30:].mean()
    assert 0.6 < float(left / right) < 1.6


def test_rim_gain_is_of_the_rims_and_takes_its_signal_from_behind() -> None:
    mask = torch.zeros(40, 50, 40)
    mask[4:36, 4:46, 4:36] = 1
    drawn = [rim_gain(mask, Draw(seed)) for seed in range(10)]
    gains, dimming = (torch.stack(part) for part in zip(*drawn, strict=True))
    assert 0.3 <= gains.min() < 0.9
    mean = gains.mean(0)
    assert mean[:20].max() > 1.15
    assert (mean[26:32, 20:30, 16:24] - 1).abs().max() < 0.05  # deep and high: no air near
    assert 0 < dimming.min() < 0.9
    assert dimming.max() <= 1.0
    assert dimming[:, 26:32, 20:30, 16:24].min() > 0.95


def test_pile_up_comes_in_one_piece_or_in_many() -> None:
    mask = torch.zeros(40, 50, 40)
    mask[4:36, 4:46, 4:36] = 1
    pieces = [ndimage.label(rim_gain(mask, Draw(seed))[0].numpy() > 1.3)[1] for seed in range(12)]
    assert min(pieces) <= 4
    assert max(pieces) >= 8


def test_voxels_average_what_they_hold() -> None:
    image = torch.zeros(1, 4, 4, 4)
    image[0, :2, :2, 0] = 8.0
    assert to_voxels(image, (2.0, 2.0, 2.0))[0, 0, 0, 0] == pytest.approx(4.0)
    assert to_voxels(image, (4.0, 2.0, 2.0))[0, 0, 0, 0] == pytest.approx(2.0)


def test_blur_ghost_and_softening_keep_a_flat_image_flat() -> None:
    flat = torch.full((12, 13, 14), 2.0)
    for blurred in (blur(flat, 1.0), blur(flat, 3.0), soften(flat, 0.1)):
        assert torch.allclose(blurred, flat, atol=1e-5)
    assert torch.allclose(ghost(flat, 0.03), flat * 1.03)


def test_blur_spreads_as_a_gaussian() -> None:
    point = torch.zeros(21, 21, 21)
    point[10, 10, 10] = 1
    spread = blur(point, 1.2)
    at = torch.arange(21.0) - 10
    assert float((spread.sum((1, 2)) * at**2).sum()) == pytest.approx(1.2**2, rel=0.05)
    assert float(spread.sum()) == pytest.approx(1.0, rel=1e-4)


def test_damage_changes_parameters_by_its_factors() -> None:
    maps = uniform_maps()
    damage = Damage.none(maps.adc)
    damage.log_adc[0] = math.log(0.5)
    damage.log_t2[0] = math.log(1.5)
    damaged = damage.apply(maps)
    assert damaged.adc[0, 0, 0] == pytest.approx(0.4)
    assert damaged.t2_ms[0, 0, 0] == pytest.approx(120.0)
    assert torch.equal(damaged.adc[1:], maps.adc[1:])
    expected = -1.0 * (0.4 - 0.8) - 80 * (1 / 120 - 1 / 80)
    before, after = (
        spin_echo(m, 80, 1e9) * diffusion_attenuation(m.adc, 1000) / m.proton_density for m in (maps, damaged)
    )
    assert torch.log(after / before)[0, 0, 0] == pytest.approx(expected, rel=1e-4)


def test_the_table_orders_tissues_as_the_literature_does() -> None:
    white, cortex, csf, pallidum = (TISSUES[t] for t in (Tissue.WHITE, Tissue.CORTEX, Tissue.CSF, Tissue.PALLIDUM))
    assert white.adc < cortex.adc < 1.0 < 2.8 < csf.adc < 3.2
    assert pallidum.t2_ms < white.t2_ms < cortex.t2_ms < csf.t2_ms
    assert white.t1_ms < cortex.t1_ms < csf.t1_ms


@pytest.mark.parametrize("contrast", [1.5, 2.0, 2.5])
@pytest.mark.parametrize("adc", [0.5, 0.8, 1.0])
def test_a_lesion_shows_the_contrast_it_was_drawn_with(contrast: float, adc: float) -> None:
    normal = uniform_maps(t2=NORMAL_T2_MS, adc=NORMAL_ADC)
    lesion = uniform_maps(t2=NORMAL_T2_MS * t2_for(contrast, adc), adc=NORMAL_ADC * adc)
    before, after = (
        spin_echo(maps, NOMINAL_TE_MS, 1e6) * diffusion_attenuation(maps.adc, 1000.0) for maps in (normal, lesion)
    )
    reached = float((after / before)[0, 0, 0])
    if t2_for(contrast, adc) < HIGHEST_T2:
        assert reached == pytest.approx(contrast, rel=1e-3)
    else:  # no tissue has such a T2
        assert 1.3 < reached < contrast


def test_diffusion_alone_may_exceed_the_contrast_asked_for() -> None:
    assert t2_for(1.35, 0.4) == 1.0
    assert t2_for(50.0, 1.0) == HIGHEST_T2
