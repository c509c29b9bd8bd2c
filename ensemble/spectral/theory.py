"""Count the modes of a covariance that N samples determine, and predict how well two classes separate in them (docs/adr/0030). numpy only.

Of N samples in D dimensions, a mode (eigenvector of the covariance S) counts as recoverable when its eigenvalue exceeds the error to be
expected of the sample covariance, l_k > E||S_N - S|| (operator norm): by Weyl's inequality no eigenvalue deviates by more, so such a
mode can't be noise alone, and a smaller one can. This is the criterion of Dhinagar et al. (arXiv 2605.08764), with the error itself in
place of its rate sqrt(D/N). It is stricter than the threshold of Baik, Ben Arous and Péché (2005), above which a spike separates from the
bulk of white noise; a power-law spectrum has no such bulk.

Both sides of the inequality have to be estimated. Eigenvalues of S_N are spread out; they are brought back by Mestre's estimator (IEEE
Trans. Inf. Theory 2008), made monotone and smooth, and then corrected until Gaussians with this spectrum have the observed eigenvalues.
The expected error is that of such Gaussians (a parametric bootstrap: the plain one fails in many dimensions, El Karoui and Purdom,
JMLR 2018). The bound that the trust score uses instead (`trust/spectrum.py`) is up to 2.3 times this error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import erf, log, sqrt
from statistics import NormalDist

import numpy as np

from ensemble.trust.spectrum import principal_components
from ensemble.types import AnyArray

#: Smoothing of eigenvalues: standard deviation in log k.
_WIDTH = 0.7
#: Number of corrections of the spectrum, of Gaussian samples for each, and of samples for the expected error.
_CORRECTIONS, _DRAWS, _FLOOR_DRAWS = 2, 10, 40
#: Eigenvalues below this share of the largest are nothing.
_NOTHING = 1e-12
_NORMAL = NormalDist()


@dataclass(frozen=True)
class RecoverableModes:
    """How many eigenmodes of a covariance n samples determine.

    Holds its estimated spectrum, and the expected error of the sample covariance.
    """

    n: int
    """Degrees of freedom: samples less the means that were taken off."""
    spectrum: AnyArray
    """(D,), estimated eigenvalues of the covariance itself, largest first."""
    floor: float
    """Estimated E||S_N - S||."""

    @property
    def crossing(self) -> float:
        """Where the spectrum falls below the floor, as a fractional number of modes."""
        return crossing(self.spectrum, self.floor)

    @property
    def modes(self) -> int:
        """K(N): how many modes are recoverable."""
        return int(self.crossing)

    @property
    def gap(self) -> float:
        """The eigengap behind mode K(N), in units of the floor; 0 without modes.

        By Davis and Kahan, the stable modes' subspace is tilted by an angle whose sine is at most 1 / gap (no statement below 1).
        """
        k = self.modes
        if k == 0 or self.floor <= 0:
            return 0.0
        below = self.spectrum[k] if k < len(self.spectrum) else 0.0
        return float(self.spectrum[k - 1] - below) / self.floor

    def at(self, n: int, seed: int = 0) -> RecoverableModes:
        """Return the recovery expected with another number of samples, for the estimated spectrum."""
        return RecoverableModes(n, self.spectrum, expected_error(self.spectrum, n, seed=seed))


def recoverable_modes(eigenvalues: AnyArray, n: int, dimensions: int, seed: int = 0) -> RecoverableModes:
    """Return how many modes a sample covariance (eigenvalues, largest first; n degrees of freedom, D dimensions) determines.

    Raises ValueError for less than one degree of freedom, or eigenvalues that are no numbers.
    """
    values = np.asarray(eigenvalues, np.float64)[: min(n, dimensions)]
    if n < 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"no spectrum: {len(values)} eigenvalues, n = {n}")
    if values[0] <= 0:
        return RecoverableModes(n, np.zeros(dimensions), 0.0)
    spectrum = population_spectrum(values, n, dimensions, seed)
    return RecoverableModes(n, spectrum, expected_error(spectrum, n, seed=seed))


def crossing(spectrum: AnyArray, floor: float) -> float:
    """Return how many eigenvalues (largest first) exceed the floor, fractional: log-linear in k between two of them.

    Below the first it is l_1 / floor, less than 1.
    """
    values = np.asarray(spectrum, np.float64)
    if floor <= 0:
        return float((values > 0).sum())
    above = int((values > floor).sum())
    if above == 0:
        return float(values[0]) / floor * (1 - 1e-12)
    if above == len(values) or values[above] <= 0:
        return float(above)
    return above + min(log(values[above - 1] / floor) / log(values[above - 1] / values[above]), 1 - 1e-12)


def expected_error(spectrum: AnyArray, n: int, draws: int = _FLOOR_DRAWS, seed: int = 0) -> float:
    """Return E||S_N - S|| of Gaussians with these eigenvalues, from samples of n degrees of freedom: the mean of some draws."""
    kept = _that_matter(spectrum)
    if not len(kept):
        return 0.0
    errors = []
    for sample in _sample_covariances(kept, n, draws, seed):
        ends = np.linalg.eigvalsh(sample - np.diag(kept))
        errors.append(max(-ends[0], ends[-1]))
    return float(np.mean(errors))


def population_spectrum(eigenvalues: AnyArray, n: int, dimensions: int, seed: int = 0) -> AnyArray:
    """Return estimated eigenvalues (D,) of a covariance from those of a sample of n degrees of freedom, both largest first.

    Their sum is that of the sample's, which has no bias. Where there are fewer samples than dimensions, the upper half of what was seen is
    followed by a power law.
    """
    values = np.asarray(eigenvalues, np.float64)[: min(n, dimensions)]
    total, head = float(values.sum()), min(observed_modes(n, dimensions), len(values))
    first = _smoothed(np.maximum(_monotone(np.maximum(_mestre(values, n), 0)), _NOTHING * values[0]))
    spectrum = _with_tail(first[:head], total, dimensions)
    for _ in range(_CORRECTIONS):
        kept = _that_matter(spectrum)
        drawn = np.zeros(dimensions)
        for sample in _sample_covariances(kept, n, _DRAWS, seed):
            drawn[: len(kept)] += np.linalg.eigvalsh(sample)[::-1] / _DRAWS
        size, least = min(head, len(kept)), _NOTHING * values[0]
        off = np.log(np.maximum(values[:size], least) / np.maximum(drawn[:size], least))
        corrected = spectrum[:size] * np.exp(_kernel(size) @ off)
        spectrum = _with_tail(np.sort(corrected)[::-1], total, dimensions)
    return spectrum


def mode_overlaps(spectrum: AnyArray, n: int, draws: int = _DRAWS, seed: int = 0) -> AnyArray:
    """Return how the modes of a sample mix those of the covariance (m, D): expected squared cosines, rows sample's, columns covariance's.

    Times the spectrum it gives the variance that there really is along each sample mode, of which the sample's eigenvalue says too much
    (what Ledoit and Péché, Probab. Theory Relat. Fields 2011, derive for many dimensions).
    """
    kept = _that_matter(spectrum)
    mixed = np.zeros((min(n, len(kept)), len(spectrum)))
    for sample in _sample_covariances(kept, n, draws, seed):
        mixed[:, : len(kept)] += np.linalg.eigh(sample)[1].T[::-1][: len(mixed)] ** 2 / draws
    return mixed


def variances_along(recovery: RecoverableModes, modes: int, seed: int = 0) -> AnyArray:
    """Return the population's variance (modes,) along the first modes of the sample; 0 beyond the rank of the estimate."""
    mixed = mode_overlaps(recovery.spectrum, recovery.n, seed=seed)[:modes]
    return np.pad(mixed @ recovery.spectrum, (0, modes - len(mixed)))


def observed_modes(n: int, dimensions: int) -> int:
    """Return how many eigenvalues rest on the sample alone: all, or half as many as samples if dimensions exceed samples."""
    return dimensions if n >= dimensions else max(1, n // 2)


def _sample_covariances(spectrum: AnyArray, n: int, draws: int, seed: int) -> Iterator[AnyArray]:
    """Covariances (D, D) of Gaussian samples in their own axes; by Bartlett's decomposition where there are more samples than dimensions.

    The largest spread is that of few numbers, the squared lengths along each axis; they are spread evenly over the draws (a Latin
    hypercube), so that few draws tell a mean.
    """
    draw, size, root = np.random.default_rng(seed), len(spectrum), np.sqrt(spectrum)
    levels = draw.permuted(np.tile((np.arange(draws) + 0.5) / draws, (size, 1)), axis=1)
    for level in levels.T:
        lengths = _chi_square(level, n)
        if n >= size:
            factor = np.tril(draw.standard_normal((size, size)), -1)
            # of row i, i entries are normal and the rest of the squared length lies on the diagonal
            factor[np.diag_indices(size)] = np.sqrt(draw.chisquare(n - np.arange(size)))
        else:
            factor = draw.standard_normal((size, n))
        factor *= (np.sqrt(lengths / (factor**2).sum(axis=1)) * root)[:, None]
        yield factor @ factor.T / n


def _chi_square(levels: AnyArray, degrees: int) -> AnyArray:
    """Quantiles of chi-square (Wilson and Hilferty 1931)."""
    normal = np.array([_NORMAL.inv_cdf(float(level)) for level in levels])
    return np.asarray(degrees * np.maximum(1 - 2 / (9 * degrees) + normal * sqrt(2 / (9 * degrees)), 1e-3) ** 3)


def _mestre(values: AnyArray, n: int) -> AnyArray:
    """Mestre's estimates: n times how far each eigenvalue lies above the root between it and the next of (1/n) sum of v / (v - x) = 1."""
    root = np.sqrt(values)
    roots = np.linalg.eigvalsh(np.diag(values) - np.outer(root, root) / n)[::-1]
    return np.asarray(n * (values - roots))


def _monotone(values: AnyArray) -> AnyArray:
    """Nearest falling sequence (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        block = (float(value), 1)
        while blocks and blocks[-1][0] < block[0]:
            mean, size = blocks.pop()
            block = ((mean * size + block[0] * block[1]) / (size + block[1]), size + block[1])
        blocks.append(block)
    return np.concatenate([np.full(size, mean) for mean, size in blocks])


def _kernel(size: int) -> AnyArray:
    """Weights (size, size) of a smoothing in log k, each row adding up to 1."""
    place = np.log(np.arange(1, size + 1))
    weights = np.exp(-0.5 * ((place[:, None] - place) / _WIDTH) ** 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _smoothed(values: AnyArray) -> AnyArray:
    """Local lines through log values against log k, none of them rising."""
    place, height, weights = np.log(np.arange(1, len(values) + 1)), np.log(values), _kernel(len(values))
    middle, mean = weights @ place, weights @ height
    spread = weights @ place**2 - middle**2
    slope = (weights @ (place * height) - middle * mean) / np.maximum(spread, 1e-12)
    return np.asarray(np.exp(mean + np.minimum(np.where(spread > 1e-9, slope, 0.0), 0.0) * (place - middle)))


def _with_tail(head: AnyArray, total: float, dimensions: int) -> AnyArray:
    """The eigenvalues (D,) that begin so and add up to the total; the rest falls as a power law from where the head ends."""
    size, rest = len(head), total - float(head.sum())
    if size < dimensions:
        places = np.arange(size + 1, dimensions + 1) / size
        if rest <= 0:
            tail = np.zeros(dimensions - size)
        elif head[-1] * len(places) <= rest:
            tail = np.full(len(places), rest / len(places))
        else:
            exponent = _root(lambda x: float((head[-1] * places**-x).sum()) - rest, 0.0, 60.0)
            tail = head[-1] * places**-exponent
        head = np.sort(np.concatenate([head, tail]))[::-1]
    return np.asarray(head * (total / head.sum()))


def _root(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function is 0, by halving."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return low


def _that_matter(spectrum: AnyArray) -> AnyArray:
    values = np.asarray(spectrum, np.float64)
    return values[values > _NOTHING * values[0]]


@dataclass(frozen=True)
class PowerLaw:
    """Eigenvalues l_k = scale k^-exponent, from mode `first` to mode `last` (counted from 1)."""

    exponent: float
    scale: float
    first: int
    last: int

    def at(self, modes: AnyArray) -> AnyArray:
        """Return the eigenvalues of modes, counted from 1."""
        return np.asarray(self.scale * np.asarray(modes, np.float64) ** -self.exponent)


#: Fewest modes of a power law, and how far it must reach: a factor in k.
_FEWEST, _REACH = 5, 3.0


def fit_power_law(spectrum: AnyArray, n: int, known: int | None = None) -> PowerLaw | None:
    """Return the power law that holds over the widest range of modes, widest in log k; None where none does.

    It holds where no eigenvalue is off the line by more than 10 %, or two standard errors of one, sqrt(2 / n), whichever is more, and
    over a factor of three in k. Of modes beyond `known` nothing is asked.
    """
    values = _that_matter(spectrum)[:known]
    place, height = np.log(np.arange(1, len(values) + 1)), np.log(values)
    allowed = max(0.1, 2 * sqrt(2 / n))
    best: tuple[float, PowerLaw] | None = None
    for first in range(1, len(values) // int(_REACH) + 1):
        for last in range(len(values), max(first + _FEWEST - 1, int(_REACH * first)) - 1, -1):
            width = log(last / first)
            if best is not None and width <= best[0]:
                break
            x, y = place[first - 1 : last], height[first - 1 : last]
            slope, intercept = np.polyfit(x, y, 1)
            if np.abs(y - intercept - slope * x).max() <= allowed:
                best = width, PowerLaw(-float(slope), float(np.exp(intercept)), first, last)
                break
    return best[1] if best is not None else None


def zeta(exponent: float, modes: int) -> float:
    """Return the truncated zeta sum: k^-exponent over k = 1 to `modes`. It converges for exponents above 1, to Riemann's zeta function."""
    return float((np.arange(1, modes + 1, dtype=np.float64) ** -exponent).sum())


def zeta_energy(scale: float, exponent: float, modes: int) -> float:
    """Return E_K where both laws hold: l_k = c k^-a and (u_k . (m1 - m0))^2 = d k^-b give (d / c) zeta_K(b - a)."""
    return scale * zeta(exponent, modes)


def fit_zeta(energies: AnyArray) -> tuple[float, float]:
    """Return scale d / c and exponent b - a of the zeta form that fits the energies of single modes (K,): least squares on their sums."""
    sums, best = np.cumsum(np.asarray(energies, np.float64)), (np.inf, 0.0, 0.0)
    modes = np.arange(1, len(sums) + 1, dtype=np.float64)
    for exponent in np.linspace(-1, 5, 121):
        form = np.cumsum(modes**-exponent)
        scale = max(0.0, float(form @ sums / (form @ form)))
        off = float(((sums - scale * form) ** 2).sum())
        if off < best[0]:
            best = off, scale, float(exponent)
    return best[1], best[2]


def predicted_auc(energy: float) -> float:
    """Return the AUC of the best linear rule between Gaussians of one covariance: Phi(sqrt(E / 2)), E their squared distance."""
    return _phi(sqrt(max(0.0, energy) / 2))


def few_shot_auc(energy: float, modes: int, counts: tuple[int, int]) -> float:
    """Return the expected AUC of a linear rule in `modes` modes, fitted on `counts` samples of the two classes.

    Errors of the class means add K (1/n0 + 1/n1) to the energy in the denominator, and a covariance with n0 + n1 - 2 degrees of freedom
    gives a factor sqrt(1 - K / (n0 + n1 - 2)) (Raudys and Young, J. Multivar. Anal. 2004).
    """
    degrees = sum(counts) - 2
    if energy <= 0 or modes < 1 or degrees <= modes:
        return 0.5
    noise = modes * (1 / counts[0] + 1 / counts[1])
    return _phi(energy / sqrt(2 * (energy + noise)) * sqrt(1 - modes / degrees))


def expected_auc(spectrum: AnyArray, difference: AnyArray, modes: int, counts: tuple[int, int], seed: int = 0) -> float:
    """Return the AUC that both laws foretell of a rule in that many modes, learnt of so many samples of either class.

    `difference` (D,) is u_k . (m1 - m0). Other than the zeta form, this reckons with sample modes that mix those of the covariance and
    with means that are off: it is the mean over covariances drawn from the law. Below as many samples as dimensions that matters.
    """
    spectrum, difference = np.asarray(spectrum, np.float64), np.asarray(difference, np.float64)
    draw, found = np.random.default_rng(seed + 1), []
    for sample in _sample_covariances(spectrum, sum(counts) - 2, _FLOOR_DRAWS, seed):
        vectors = np.linalg.eigh(sample)[1].T[::-1][:modes]
        variances, along = vectors**2 @ spectrum, vectors @ difference
        seen = along + draw.standard_normal(len(along)) * np.sqrt(variances * (1 / counts[0] + 1 / counts[1]))
        rule = seen / variances
        found.append(_phi(float(rule @ along) / sqrt(2 * float(rule**2 @ variances))))
    return float(np.mean(found))


def _phi(x: float) -> float:
    return 0.5 * (1 + erf(x / sqrt(2)))


@dataclass(frozen=True)
class Separation:
    """How well two classes separate, mode by mode of the covariance that they share."""

    recovery: RecoverableModes
    modes: AnyArray
    """(m, D), orthonormal eigenvectors of the sample covariance within the classes, by falling eigenvalue."""
    means: tuple[AnyArray, AnyArray]
    """(D,) of either class."""
    counts: tuple[int, int]
    variances: AnyArray
    """(m,), estimated variance along each."""
    energies: AnyArray
    """(m,): the estimated share of each mode in the squared Mahalanobis distance, without what chance adds; it may be negative."""

    @property
    def used(self) -> int:
        """Modes that a rule uses: K(N), but one at least."""
        return min(max(1, self.recovery.modes), len(self.modes))

    def energy(self, modes: int | None = None) -> float:
        """Return E_K, the truncated Mahalanobis energy in the first modes, K(N) by default; not below 0."""
        return max(0.0, float(self.energies[: self.used if modes is None else modes].sum()))

    def direction(self, modes: int | None = None) -> AnyArray:
        """Return the linear rule (D,) in that many modes; larger products indicate the second class."""
        used = self.used if modes is None else modes
        along = self.modes[:used] @ (self.means[1] - self.means[0])
        return np.asarray((along / _safe(self.variances[:used])) @ self.modes[:used])


def class_separation(first: AnyArray, second: AnyArray, seed: int = 0) -> Separation:
    """Return how well two classes, each (n, D), separate, assuming that they share a covariance.

    Raises ValueError for fewer than two samples of either.
    """
    samples = [np.asarray(part, np.float64) for part in (first, second)]
    if min(map(len, samples)) < 2:
        raise ValueError(f"two samples of each class are needed, not {[len(part) for part in samples]}")
    means = samples[0].mean(axis=0), samples[1].mean(axis=0)
    centred = np.concatenate([part - mean for part, mean in zip(samples, means, strict=True)])
    degrees, dimensions = len(centred) - 2, centred.shape[1]
    values, modes = principal_components(centred, degrees)
    recovery = recoverable_modes(values, degrees, dimensions, seed)
    counts = len(samples[0]), len(samples[1])
    chance = 1 / counts[0] + 1 / counts[1]
    variances = variances_along(recovery, len(modes), seed)
    energies = (modes @ (means[1] - means[0])) ** 2 / _safe(variances) - chance
    return Separation(recovery, modes, means, counts, variances, energies)


def _safe(values: AnyArray) -> AnyArray:
    """Return eigenvalues as divisors; zeros become infinity, so that the quotient is 0."""
    largest = float(np.max(values, initial=0.0))
    return np.where(values > _NOTHING * largest, values, np.inf) if largest > 0 else np.full(len(values), np.inf)


def auc(first: AnyArray, second: AnyArray) -> float:
    """Return the share of pairs in which the second class has the larger value; ties count half."""
    from_low = np.sort(np.asarray(first, np.float64))
    below = np.searchsorted(from_low, second, side="left")
    up_to = np.searchsorted(from_low, second, side="right")
    return float((below + up_to).mean() / 2 / max(1, len(from_low)))
