"""Find the stable modes of feature vectors, and the distance of a new vector from their mean in these modes (docs/adr/0026).

Of N samples in D dimensions, only eigenvectors whose eigenvalue exceeds the error of the sample covariance, ||S_N - S||, are
reliable (Dhinagar et al., "Anchoring the Eigengap", arXiv 2605.08764). For Gaussians that error is at most
||S|| (2 sqrt(r / N) + r / N) with the effective rank r = tr S / ||S|| <= D (Koltchinskii and Lounici, Bernoulli 2017; Han, 2022): just that
if all eigenvalues are equal, half of it if one dominates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemble.types import AnyArray

#: Share of the floor that an eigenvalue must exceed for its mode to count. 1 is the bound, which of 60 cases leaves one or two modes; this
#: share was chosen on the calibration's patients (docs/adr/0026).
TAU = 0.25


def noise_floor(eigenvalues: AnyArray, n: int) -> float:
    """Return the estimated spectral norm of S_N - S, given the eigenvalues of S_N (largest first).

    S_N is the sample covariance of n samples, S the true covariance. The norm is estimated from the sample: tr S_N estimates tr S without
    bias, and the largest eigenvalue is inflated by the same error, l_1(S_N) = (sqrt(l_1) + sqrt(tr S / n))^2, which is solved for l_1.
    """
    trace, top = float(np.sum(eigenvalues)), float(np.max(eigenvalues, initial=0.0))
    noise = trace / n
    largest = max(top**0.5 - noise**0.5, 0.0) ** 2
    return 2 * (largest * noise) ** 0.5 + noise


def count_stable_modes(eigenvalues: AnyArray, n: int, tau: float = TAU) -> int:
    """Return K(N): how many eigenvalues of a covariance from n samples exceed `tau` times the noise floor."""
    return int((np.asarray(eigenvalues) > tau * noise_floor(eigenvalues, n)).sum())


@dataclass(frozen=True)
class Spectrum:
    """The distribution of feature vectors: mean, stable modes and their eigenvalues."""

    mean: AnyArray
    """(D,)."""
    vectors: AnyArray
    """(K, D), orthonormal, by falling eigenvalue."""
    values: AnyArray
    """(K,), eigenvalues."""
    n: int
    """Number of samples."""

    @property
    def modes(self) -> int:
        """K(N)."""
        return len(self.values)

    def energy(self, features: AnyArray) -> float:
        """Return the truncated squared Mahalanobis distance of a vector (D,): sum over k <= K of (u_k . (x - m))^2 / l_k."""
        along = self.vectors @ (np.asarray(features, np.float64) - self.mean)
        return float((along**2 / self.values).sum())

    def distance(self, features: AnyArray) -> float:
        """Return the root mean energy per mode: about 1 for a vector of the same distribution, whatever K is."""
        return (self.energy(features) / max(1, self.modes)) ** 0.5

    def rest(self, features: AnyArray) -> float:
        """Return the Euclidean distance of a vector (D,) from the mean outside the stable modes."""
        away = np.asarray(features, np.float64) - self.mean
        return float(np.linalg.norm(away - self.vectors.T @ (self.vectors @ away)))


def eigenmodes(samples: AnyArray) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Return mean (D,), eigenvalues (m,) largest first, and eigenvectors (m, D) of samples (N, D), m = min(N - 1, D).

    By the singular values of the centred samples, so that D may be far larger than N. Raises ValueError for fewer than two samples.
    """
    array = np.asarray(samples, np.float64)
    if array.ndim != 2 or len(array) < 2:
        raise ValueError(f"a spectrum needs two samples (N, D) or more, not {array.shape}")
    mean = array.mean(axis=0)
    return mean, *principal_components(array - mean, len(array) - 1)


def principal_components(centred: AnyArray, degrees: int) -> tuple[AnyArray, AnyArray]:
    """Return eigenvalues (m,) of centred samples (N, D), largest first, and eigenvectors (m, D); m = min(degrees of freedom, D)."""
    _, singular, vectors = np.linalg.svd(centred, full_matrices=False)
    kept = min(degrees, centred.shape[1])
    return singular[:kept] ** 2 / degrees, vectors[:kept]


def fit_spectrum(samples: AnyArray, tau: float = TAU, modes: int | None = None) -> Spectrum:
    """Fit a spectrum to samples (N, D) with K(N) stable modes, or with `modes`. Raises ValueError for fewer than two samples."""
    mean, values, vectors = eigenmodes(samples)
    kept = count_stable_modes(values, len(samples), tau) if modes is None else modes
    return Spectrum(mean, vectors[:kept], values[:kept], len(samples))
