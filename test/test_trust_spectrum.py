"""Stable modes and truncated Mahalanobis distance, on Gaussians whose spectrum is known."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble.trust.spectrum import count_stable_modes, eigenmodes, fit_spectrum, noise_floor
from ensemble.types import AnyArray


def gaussian(spectrum: AnyArray, n: int, seed: int = 0) -> AnyArray:
    """Samples (n, D) of a centred Gaussian with this spectrum along the axes."""
    return np.random.default_rng(seed).standard_normal((n, len(spectrum))) * np.sqrt(spectrum)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 2.0, 10.0])
def test_the_noise_floor_bounds_the_error_of_the_covariance(exponent: float, ratio: float) -> None:
    """Never much below ||S_N - S|| and at most 2.3 times of it, from far fewer samples than dimensions to far more."""
    spectrum = np.arange(1, 101) ** -exponent
    floors, errors = [], []
    for seed in range(5):
        samples = gaussian(spectrum, round(ratio * len(spectrum)), seed)
        _, values, _ = eigenmodes(samples)
        floors.append(noise_floor(values, len(samples)))
        errors.append(np.linalg.norm(np.cov(samples.T) - np.diag(spectrum), 2))
    assert 0.85 < np.mean(floors) / np.mean(errors) < 2.3


@pytest.mark.parametrize("ratio", [0.5, 2.0, 10.0])
def test_of_equal_eigenvalues_the_floor_is_the_error_itself(ratio: float) -> None:
    samples = gaussian(np.ones(200), round(200 * ratio))
    _, values, _ = eigenmodes(samples)
    assert noise_floor(values, len(samples)) == pytest.approx(
        np.linalg.norm(np.cov(samples.T) - np.eye(200), 2), rel=0.15
    )


def test_planted_modes_are_counted_and_the_bulk_is_not() -> None:
    spectrum = np.concatenate([[40.0, 25.0, 16.0], np.full(97, 0.05)])
    for seed in range(5):
        _, values, vectors = eigenmodes(gaussian(spectrum, 200, seed))
        assert count_stable_modes(values, 200, tau=1) == 3
        assert np.linalg.norm(vectors[:3, :3], axis=1).min() > 0.97  # and lie where they were planted


def test_more_samples_make_more_modes_stable() -> None:
    spectrum = np.arange(1, 101) ** -1.0
    counts = [fit_spectrum(gaussian(spectrum, n), tau=1).modes for n in (10, 100, 1000, 10000)]
    assert counts == sorted(counts)
    assert counts[0] <= 2 < 10 < counts[-1]


def test_noise_alone_in_many_dimensions_has_next_to_no_mode() -> None:
    """D >> N: the sample's eigenvalues are all noise, although the largest is 17 times the true one."""
    assert fit_spectrum(gaussian(np.ones(1000), 100), tau=1).modes <= 3


def test_the_distance_is_about_one_in_the_cloud_and_right_beyond() -> None:
    spectrum = np.concatenate([[40.0, 25.0, 16.0], np.full(97, 0.05)])
    cloud = fit_spectrum(gaussian(spectrum, 500))
    inside = [cloud.energy(x) for x in gaussian(spectrum, 2000, seed=1)]
    assert np.mean(inside) == pytest.approx(3, rel=0.15)  # a chi-square of K degrees of freedom
    assert np.quantile(inside, 0.95) == pytest.approx(7.81, rel=0.15)
    far = np.zeros(100)
    far[0] = 5 * 40.0**0.5
    assert cloud.energy(far) == pytest.approx(25, rel=0.2)
    assert cloud.distance(far) == pytest.approx((25 / 3) ** 0.5, rel=0.15)


def test_noise_beyond_the_stable_modes_does_not_count() -> None:
    """The plain Mahalanobis distance is ruled by what is not known: of 50 samples in 100 dimensions it is infinite, this one isn't."""
    spectrum = np.concatenate([[100.0], np.full(99, 0.01)])
    cloud = fit_spectrum(gaussian(spectrum, 50))
    off = np.zeros(100)
    off[50] = 0.3  # three standard deviations along an unknown direction
    assert cloud.modes == 1
    assert cloud.energy(off) < 0.1
    assert cloud.rest(cloud.mean + off) == pytest.approx(0.3, rel=0.05)
    assert cloud.rest(cloud.mean + 7 * cloud.vectors[0]) < 1e-9


def test_a_cloud_without_spread_has_no_mode_and_no_distance() -> None:
    cloud = fit_spectrum(np.ones((10, 5)))
    assert (cloud.modes, cloud.distance(np.zeros(5))) == (0, 0.0)
    with pytest.raises(ValueError, match="two samples"):
        fit_spectrum(np.ones((1, 5)))
