"""Zeta-based spectral filtering, as a transformer of scikit-learn."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from ensemble.spectral.theory import fit_power_law, observed_modes, recoverable_modes, variances_along
from ensemble.trust.spectrum import principal_components
from ensemble.types import AnyArray


class ZetaFilter(TransformerMixin, BaseEstimator):
    """Keep the K(N) recoverable modes and scale each to unit variance by a law instead of by noise.

    The eigenvalue of a mode is that of the power law c k^-a where one holds (`theory.fit_power_law`), so that energies are terms
    of a truncated zeta sum, and elsewhere the variance that there is along a sample's mode (`theory.mode_overlaps`). A rule learnt on what
    `transform` gives, and that takes the covariance for the identity (the nearest mean, say), is the truncated Mahalanobis rule.

    Given classes `y`, the covariance is that within them.
    """

    def __init__(self, modes: int | None = None, power_law: bool = True, random_state: int = 0) -> None:
        """`modes` instead of K(N); `power_law` false: without the law."""
        self.modes = modes
        self.power_law = power_law
        self.random_state = random_state

    def fit(self, X: AnyArray, y: AnyArray | None = None) -> Self:  # noqa: N803 (scikit-learn's name)
        """Learn modes of samples (N, D). Raises ValueError for fewer than two, or none beside the means."""
        samples = np.asarray(validate_data(self, X, dtype=np.float64, ensure_min_samples=2))
        classes = np.zeros(len(samples)) if y is None else np.asarray(y)
        if y is not None and (len(classes) != len(samples) or len(np.unique(classes)) > len(samples) // 2):
            classes = np.zeros(len(samples))  # numbers to be predicted are no classes
        labels = np.unique(classes)
        centred = samples.copy()
        for label in labels:
            centred[classes == label] -= samples[classes == label].mean(axis=0)
        degrees = len(samples) - len(labels)
        values, vectors = principal_components(centred, degrees)
        recovery = recoverable_modes(values, degrees, samples.shape[1], self.random_state)
        self.mean_ = samples.mean(axis=0)
        self.n_modes_ = min(max(1, recovery.modes if self.modes is None else self.modes), len(vectors))
        variances = variances_along(recovery, len(vectors), self.random_state)
        self.power_law_ = (
            fit_power_law(recovery.spectrum, degrees, observed_modes(degrees, samples.shape[1]))
            if self.power_law
            else None
        )
        if (law := self.power_law_) is not None:
            last = min(law.last, len(vectors))
            held = np.arange(law.first, last + 1)
            # the law takes the noise out of the spectrum; how much of it lies along a sample's mode stays as it is
            variances[law.first - 1 : last] *= law.at(held) / recovery.spectrum[law.first - 1 : last]
        self.components_ = vectors[: self.n_modes_]
        self.eigenvalues_ = variances[: self.n_modes_]
        return self

    def transform(self, X: AnyArray) -> AnyArray:  # noqa: N803
        """Return the samples in the modes kept (N, K), of unit variance each."""
        check_is_fitted(self)
        samples = np.asarray(validate_data(self, X, dtype=np.float64, reset=False))
        scale = np.where(self.eigenvalues_ > 0, self.eigenvalues_, np.inf) ** -0.5
        return np.asarray((samples - self.mean_) @ self.components_.T * scale)

    def get_feature_names_out(self, input_features: Any = None) -> AnyArray:
        """Return the modes' names."""
        check_is_fitted(self)
        return np.array([f"mode{number}" for number in range(self.n_modes_)], dtype=object)
