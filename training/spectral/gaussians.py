"""The theory on Gaussians whose laws are known: `python -m training.spectral.gaussians`.

Eigenvalues l_k = k^-a in D dimensions, classes apart by (u_k . (m1 - m0))^2 = k^-(a + 1.5), so that the energy of K modes is zeta_K(1.5).
The true count of recoverable modes is where that spectrum falls below the mean of ||S_N - S|| over samples; the measured AUC is that of the
rule learnt of N samples, exact for Gaussians.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import erf, sqrt

import numpy as np

from ensemble.spectral.diagnosis import count_recoverable_modes
from ensemble.spectral.theory import (
    class_separation,
    crossing,
    expected_auc,
    few_shot_auc,
    predicted_auc,
    zeta,
)
from ensemble.types import AnyArray

DIMENSIONS, SIGNAL = 100, 1.5
EXPONENTS, RATIOS = (0.5, 0.7, 1.0, 1.5, 2.0), (0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Check:
    """One power law and one number of samples: means over draws."""

    exponent: float
    n: int
    true_modes: float
    modes: float
    auc: float
    """Measured."""
    by_laws: float
    """`expected_auc`, of the true laws."""
    by_zeta: float
    """Phi(sqrt(zeta_K / 2)): as if sample modes were the covariance's."""
    by_sample: float
    """`few_shot_auc`, from the energies estimated on samples alone."""


def gaussian(spectrum: AnyArray, n: int, draw: np.random.Generator) -> AnyArray:
    """Samples (n, D) in the covariance's own axes."""
    return draw.standard_normal((n, len(spectrum))) * np.sqrt(spectrum)


def true_modes(spectrum: AnyArray, n: int, draws: int, draw: np.random.Generator) -> float:
    """Where the spectrum falls below the mean error of the sample covariance, measured directly."""
    off = (np.cov(gaussian(spectrum, n, draw).T) - np.diag(spectrum) for _ in range(draws))
    errors = [np.abs(np.linalg.eigvalsh(one)).max() for one in off]
    return crossing(spectrum, float(np.mean(errors)))


def check(exponent: float, n: int, dimensions: int = DIMENSIONS, draws: int = 20, seed: int = 0) -> Check:
    """Compare the estimates with the known truth."""
    draw = np.random.default_rng(seed)
    spectrum = np.arange(1, dimensions + 1, dtype=float) ** -exponent
    size = np.sqrt(np.arange(1, dimensions + 1) ** -(exponent + SIGNAL))
    true = true_modes(spectrum, n, 10 * draws, draw)
    modes = [count_recoverable_modes(gaussian(spectrum, n, draw)).crossing for _ in range(draws)]
    half, used = max(2, n // 2), max(1, int(true))
    rows = []
    for _ in range(draws):
        difference = size * draw.choice([-1, 1], dimensions)
        both = class_separation(gaussian(spectrum, half, draw), gaussian(spectrum, half, draw) + difference)
        rule = both.direction(used)
        measured = 0.5 * (1 + erf(float(rule @ difference) / sqrt(float(rule**2 @ spectrum)) / 2))
        rows.append((measured, float(both.energies[:used].sum())))
    measured, energy = np.mean(rows, axis=0)
    by_sample = few_shot_auc(float(energy), used, (half, half))
    by_laws = expected_auc(spectrum, size, used, (half, half), seed)
    by_zeta = predicted_auc(zeta(SIGNAL, used))
    return Check(exponent, n, true, float(np.mean(modes)), float(measured), by_laws, by_zeta, by_sample)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m training.spectral.gaussians", description=__doc__)
    parser.add_argument("--draws", type=int, default=40)
    options = parser.parse_args(arguments)
    print("| a | N / D | true K | K(N) | AUC measured | by both laws | zeta form alone | by the sample |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for exponent in EXPONENTS:
        for ratio in RATIOS:
            c = check(exponent, round(ratio * DIMENSIONS), draws=options.draws)
            print(
                f"| {exponent} | {ratio} | {c.true_modes:.2f} | {c.modes:.2f} | {c.auc:.3f} | {c.by_laws:.3f} | {c.by_zeta:.3f} "
                f"| {c.by_sample:.3f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
