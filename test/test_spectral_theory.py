"""Recoverable modes and predicted AUC, on Gaussians whose laws are known."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble.spectral.theory import (
    PowerLaw,
    RecoverableModes,
    auc,
    class_separation,
    crossing,
    expected_error,
    fit_power_law,
    fit_zeta,
    mode_overlaps,
    population_spectrum,
    predicted_auc,
    recoverable_modes,
    zeta,
    zeta_energy,
)
from training.spectral.gaussians import Check, check, gaussian

EXPONENTS, RATIOS = (1.0, 1.5, 2.0), (0.1, 0.3, 1.0, 3.0, 10.0)


@pytest.fixture(scope="module")
def checks() -> dict[tuple[float, float], Check]:
    """Of 100 dimensions."""
    return {(a, q): check(a, round(100 * q), draws=10, seed=3) for a in EXPONENTS for q in RATIOS}


@pytest.mark.slow
def test_the_count_of_recoverable_modes_is_within_a_tenth_of_the_true_one(
    checks: dict[tuple[float, float], Check],
) -> None:
    """From ten samples in a hundred dimensions to a thousand; where no mode is recoverable, none is found."""
    for case, found in checks.items():
        if found.true_modes >= 1:
            assert found.modes == pytest.approx(found.true_modes, rel=0.1), case
        else:
            assert found.modes < 1, case


@pytest.mark.slow
def test_the_laws_predict_the_auc_within_three_hundredths(checks: dict[tuple[float, float], Check]) -> None:
    for case, found in checks.items():
        assert found.by_laws == pytest.approx(found.auc, abs=0.03), case
        if case[1] >= 1:  # as many samples as dimensions: the plain zeta form holds
            assert found.by_zeta == pytest.approx(found.auc, abs=0.03), case
        if case[1] >= 3:  # and samples alone tell it
            assert found.by_sample == pytest.approx(found.auc, abs=0.03), case


@pytest.mark.parametrize("n", [30, 300])
def test_the_expected_error_is_that_of_samples(n: int) -> None:
    """Below and above as many samples as dimensions, whatever way they are drawn."""
    spectrum, draw = np.arange(1, 61) ** -1.0, np.random.default_rng(0)
    errors = [np.linalg.norm(np.cov(gaussian(spectrum, n + 1, draw).T) - np.diag(spectrum), 2) for _ in range(200)]
    assert expected_error(spectrum, n) == pytest.approx(np.mean(errors), rel=0.06)


def test_the_spectrum_is_found_beneath_the_spread_of_the_sample() -> None:
    """As many samples as dimensions: the sample's largest eigenvalue is four times the true one."""
    samples = gaussian(np.ones(100), 101, np.random.default_rng(0))
    values = np.linalg.eigvalsh(np.cov(samples.T))[::-1]
    found = population_spectrum(values, 100, 100)
    assert values[0] > 3.3
    assert found[0] < 1.8
    assert found.sum() == pytest.approx(values.sum())


def test_noise_alone_has_no_recoverable_mode() -> None:
    for n in (20, 100):
        values = np.linalg.eigvalsh(np.cov(gaussian(np.ones(100), n, np.random.default_rng(n)).T))[::-1]
        assert recoverable_modes(values, n - 1, 100).modes == 0


def test_more_samples_know_more() -> None:
    known = RecoverableModes(100, np.arange(1, 101) ** -1.0, 0.3)
    counts = [known.at(n).crossing for n in (10, 100, 1000, 10000)]
    assert counts == sorted(counts)
    assert counts[-1] > 5 * counts[0]


def test_the_gap_is_in_units_of_the_floor() -> None:
    assert RecoverableModes(50, np.array([1.0, 0.8, 0.1]), 0.2).gap == pytest.approx(3.5)
    assert RecoverableModes(50, np.array([1.0, 0.8, 0.1]), 2.0).gap == 0


def test_the_crossing_is_continuous() -> None:
    spectrum = np.array([1.0, 0.5, 0.25])
    assert crossing(spectrum, 0.5**0.5) == pytest.approx(1.5)
    assert int(crossing(spectrum, 0.5 - 1e-9)) == 2
    assert crossing(spectrum, 1.0) == pytest.approx(1.0)
    assert crossing(spectrum, 2.0) == pytest.approx(0.5)
    assert crossing(spectrum, 0.1) == 3
    assert crossing(np.zeros(3), 0.0) == 0


def test_a_sample_without_spread_is_a_spectrum_of_nothing() -> None:
    assert recoverable_modes(np.zeros(5), 9, 5).modes == 0
    apart = class_separation(np.ones((5, 3)), np.zeros((5, 3)))
    assert apart.energy() == 0
    assert np.isfinite(apart.direction()).all()
    with pytest.raises(ValueError, match="no spectrum"):
        recoverable_modes(np.array([np.nan]), 9, 5)
    with pytest.raises(ValueError, match="two samples of each class"):
        class_separation(np.ones((1, 3)), np.zeros((5, 3)))


def test_constant_features_beside_others_do_no_harm() -> None:
    draw = np.random.default_rng(0)
    samples = np.hstack([gaussian(np.arange(1, 11) ** -1.0, 80, draw), np.zeros((80, 5))])
    apart = class_separation(samples[:40], samples[40:] + 1)
    assert np.isfinite(apart.energies).all()
    assert np.isfinite(apart.direction()).all()


def test_sample_modes_mix_those_of_the_covariance_and_add_up() -> None:
    spectrum = np.arange(1, 31) ** -1.0
    for n, clean in ((10, 0.8), (3000, 0.97)):
        mixed = mode_overlaps(spectrum, n)
        assert mixed.shape == (min(n, 30), 30)
        assert mixed.sum(axis=1) == pytest.approx(1)
        assert (mixed[0, 0] > clean) == (n == 3000)


def test_a_power_law_is_found_where_it_holds_and_nowhere_else() -> None:
    modes = np.arange(1, 101, dtype=float)
    law = fit_power_law(2 * modes**-1.3, 1000)
    assert law is not None
    assert (law.exponent, law.scale, law.first, law.last) == (pytest.approx(1.3), pytest.approx(2), 1, 100)
    broken = np.where(modes <= 20, modes**-1.0, 20.0**-1 * (modes / 20) ** -6)
    law = fit_power_law(broken, 10000)
    assert law is not None
    assert law.exponent == pytest.approx(1, abs=0.1)
    assert 18 <= law.last <= 24
    assert fit_power_law(np.exp(-modes), 10000) is None
    assert fit_power_law(np.array([1.0, 0.5]), 10000) is None
    assert PowerLaw(2, 3, 1, 9).at(np.array([1, 2])).tolist() == [3, 0.75]


def test_the_zeta_form_is_the_sum_of_the_laws() -> None:
    modes = np.arange(1, 21, dtype=float)
    energies = 0.6 * modes**-0.4 / (0.3 * modes**-1.6)
    assert zeta_energy(2, -1.2, 20) == pytest.approx(energies.sum())
    assert fit_zeta(energies[:5] * 0 + 3 * modes[:5] ** -1.5) == (pytest.approx(3), pytest.approx(1.5))
    assert zeta(2, 100_000) == pytest.approx(np.pi**2 / 6, abs=1e-4)


def test_auc_counts_pairs() -> None:
    assert auc(np.array([0, 1, 2]), np.array([1, 3])) == pytest.approx((1.5 + 3) / 6)
    assert predicted_auc(0) == 0.5
    assert predicted_auc(2) == pytest.approx(0.8413, abs=1e-4)
