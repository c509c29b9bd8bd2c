"""Pictures of what an encoder knows: a row a stage, spectra, K(N) against N, and the energy that separates classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ensemble.spectral.diagnosis import ClassContrast, FeatureSpectrum, StageDiagnosis
from ensemble.spectral.theory import zeta_energy

_COLOURS = {"whole brain": "C0", "lesion windows": "C1", "lesion or none": "C2", "large or small": "C3"}


#: Energies are plotted up to this multiple of the stable modes, and at least this many; beyond, they are unbounded noise.
_TIMES, _FEWEST = 4, 10


def draw_diagnosis(stages: Sequence[StageDiagnosis]) -> Figure:
    """Return a figure of the diagnosis of one member's stages: spectra, stable modes by number of cases, and separation."""
    figure = Figure(figsize=(13, 3.2 * len(stages)), layout="constrained")
    for row, stage in zip(figure.subplots(len(stages), 3, squeeze=False), stages, strict=True):
        spectra, sizes, energies = row
        for name, cloud in (("whole brain", stage.brain), ("lesion windows", stage.lesion)):
            if cloud is not None:
                _spectrum(spectra, name, cloud)
                _by_size(sizes, name, cloud)
        for name, contrast in (("lesion or none", stage.presence), ("large or small", stage.size)):
            if contrast is not None:
                _energy(energies, name, contrast)
        title = f"{stage.member}, stage {stage.stage} (D = {stage.brain.dimensions})".replace("$", r"\$")
        spectra.set(
            xscale="log", yscale="log", xlabel="mode k", ylabel="eigenvalue / first", title=title, ylim=(1e-5, 2)
        )
        sizes.set(xlabel="N", ylabel="K(N)", title="stable modes: shares of the cases; line: foretold")
        energies.set(
            xscale="log", xlabel="modes", ylabel="truncated energy", title="separation; dotted: zeta form; |: K(N)"
        )
        for ax in (spectra, energies):
            ax.xaxis.set_minor_formatter(NullFormatter())
        for ax in row:
            ax.grid(alpha=0.25)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize=8)
    return figure


def _spectrum(ax: Axes, name: str, cloud: FeatureSpectrum) -> None:
    recovery, colour = cloud.recovery, _COLOURS[name]
    first = recovery.spectrum[0] if recovery.spectrum[0] > 0 else 1.0
    modes = np.arange(1, cloud.dimensions + 1)
    ax.plot(modes, np.maximum(recovery.spectrum / first, 1e-12), color=colour, label=f"{name}, N = {recovery.n + 1}")
    ax.axhline(recovery.floor / first, color=colour, linestyle="--", linewidth=1)
    if cloud.law is not None:
        held = np.arange(cloud.law.first, cloud.law.last + 1)
        label = f"k^-{cloud.law.exponent:.2f}, modes {cloud.law.first} to {cloud.law.last}"
        ax.plot(held, cloud.law.at(held) / first, color=colour, linewidth=4, alpha=0.3, label=label)


def _by_size(ax: Axes, name: str, cloud: FeatureSpectrum) -> None:
    n, foretold, mean, low, high = np.array(cloud.by_size).reshape(-1, 5).T
    colour, whole = _COLOURS[name], (cloud.recovery.n + 1, cloud.recovery.crossing)
    ax.plot([*n, whole[0]], [*foretold, whole[1]], color=colour, label=name)
    ax.errorbar(n, mean, [np.maximum(mean - low, 0), np.maximum(high - mean, 0)], fmt="o", color=colour, capsize=3)


def _energy(ax: Axes, name: str, contrast: ClassContrast) -> None:
    separation, colour = contrast.separation, _COLOURS[name]
    modes = np.arange(1, min(len(separation.energies), max(_FEWEST, _TIMES * separation.used)) + 1)
    ax.plot(
        modes,
        np.cumsum(separation.energies[: len(modes)]),
        color=colour,
        label=f"{name}, AUC measured {contrast.measured:.2f}",
    )
    used = modes[: separation.used]
    ax.plot(used, [zeta_energy(contrast.scale, contrast.exponent, int(k)) for k in used], ":", color=colour)
    ax.axvline(separation.used, color=colour, linewidth=1, alpha=0.6)
