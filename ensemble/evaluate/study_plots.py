"""Plots of a study, as PNG data URIs: differences between methods, scores against lesions, forest plots of subgroups."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ensemble.evaluate.clinical import QUANTITIES, ClinicalTable, Correlation
from ensemble.evaluate.compare import PairedComparison
from ensemble.evaluate.methods import TRUTH, Method
from ensemble.evaluate.plots import as_png
from ensemble.evaluate.scores import MEASURES, SKEWED
from ensemble.evaluate.subgroups import GroupSummary
from ensemble.text import escape_invisible

#: Pictures of more scores, and of more rows, than this are no use: the tables have them all.
_MAX_SCORES, _MAX_ROWS, _MAX_LABEL = 12, 60, 28


def draw_difference_plot(rows: Sequence[PairedComparison]) -> str:
    """Return a plot of paired differences with intervals, one panel per measure (means; medians for volumes); empty for one method."""
    if not rows:
        return ""
    pairs = list(dict.fromkeys((row.first, row.second) for row in rows))[:_MAX_ROWS]
    figure = Figure(figsize=(12, 1.3 + 0.35 * len(pairs)), layout="constrained")
    for ax, measure in zip(figure.subplots(1, len(MEASURES), squeeze=False)[0], MEASURES, strict=True):
        shown = [row for row in rows if row.measure == measure and (row.first, row.second) in pairs]
        _forest(
            ax,
            [f"{_short(row.first)} - {_short(row.second)}" for row in shown],
            [
                (row.median_difference, row.median_ci_low, row.median_ci_high)
                if measure in SKEWED
                else (row.mean_difference, row.mean_ci_low, row.mean_ci_high)
                for row in shown
            ],
            _title(measure),
            labelled=measure == MEASURES[0],
        )
        ax.axvline(0, color="0.4", linewidth=1)
    return _png(figure)


def draw_correlation_plots(
    methods: Sequence[Method], clinical: ClinicalTable | None, rows: Sequence[Correlation]
) -> list[tuple[str, str]]:
    """Plot each clinical score against volume and number of lesions, for all methods and the true masks. Returns (score, plot) pairs."""
    if clinical is None:
        return []
    rho = {(row.masks, row.quantity, row.score): row.rho for row in rows}
    pictures = []
    for name, known in list(clinical.scores.items())[:_MAX_SCORES]:
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        for ax, (quantity, (predicted, true)) in zip(figure.subplots(1, 2), QUANTITIES.items(), strict=True):
            truths = {case: one for method in methods for case, one in method.scores.items()}
            drawn = [(TRUTH, list(truths.values()), true, "x")]
            drawn += [(method.name, list(method.scores.values()), predicted, "o") for method in methods]
            for masks, cases, field, marker in drawn:
                cases = [one for one in cases if one.case in known]
                found = rho.get((masks, quantity, name))
                ax.scatter(
                    [getattr(one, field) for one in cases],
                    [known[one.case] for one in cases],
                    s=20,
                    alpha=0.7,
                    marker=marker,
                    label=f"{_short(masks)}, rho {'not told' if found is None else f'{found:.2f}'}",
                )
            ax.set_xscale("symlog", linthresh=0.1 if quantity == "volume_ml" else 1)
            ax.set(xlabel={"volume_ml": "volume (ml)", "lesions": "number of lesions"}[quantity], ylabel=_short(name))
            ax.grid(alpha=0.25)
            ax.legend(fontsize=8)
        pictures.append((name, _png(figure)))
    return pictures


def draw_forest_plots(rows: Sequence[GroupSummary]) -> list[tuple[str, str]]:
    """Plot each measure by group with its interval (means; medians for volumes). Returns (factor, plot) pairs."""
    pictures = []
    for factor in dict.fromkeys(row.factor for row in rows):
        of_factor = [row for row in rows if row.factor == factor]
        labels = list(dict.fromkeys((row.method, row.group) for row in of_factor))[:_MAX_ROWS]
        figure = Figure(figsize=(12, 1.3 + 0.3 * len(labels)), layout="constrained")
        several = len({method for method, _ in labels}) > 1
        for ax, measure in zip(figure.subplots(1, len(MEASURES), squeeze=False)[0], MEASURES, strict=True):
            shown = [row for row in of_factor if row.measure == measure and (row.method, row.group) in labels]
            _forest(
                ax,
                [f"{_short(row.method)}: " * several + f"{_short(row.group)} (n = {row.n})" for row in shown],
                [
                    (row.median, row.median_ci_low, row.median_ci_high)
                    if measure in SKEWED
                    else (row.mean, row.mean_ci_low, row.mean_ci_high)
                    for row in shown
                ],
                _title(measure),
                labelled=measure == MEASURES[0],
            )
        pictures.append((factor, _png(figure)))
    return pictures


def _title(measure: str) -> str:
    return f"{measure} ({'median' if measure in SKEWED else 'mean'})"


def _forest(
    ax: Axes,
    labels: Sequence[str],
    values: Sequence[tuple[float, float | None, float | None]],
    title: str,
    *,
    labelled: bool,
) -> None:
    """Draw values and intervals, the first row on top; a value without an interval is a hollow marker."""
    for place, (mean, low, high) in enumerate(values):
        if low is not None and high is not None:
            ax.plot((low, high), (place, place), color="tab:blue", linewidth=2)
        ax.plot(mean, place, "s", color="tab:blue", markersize=5, fillstyle="none" if low is None else "full")
    ax.set(ylim=(len(values) - 0.5, -0.5), title=title, yticks=np.arange(len(values)))
    ax.set_yticklabels(labels if labelled else [""] * len(values), fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.grid(alpha=0.25, axis="x")


def _short(text: str) -> str:
    """Return text shortened for a plot, with nothing in it that Matplotlib would read as a formula."""
    text = escape_invisible(text).replace("$", r"\$")
    return text if len(text) <= _MAX_LABEL else f"{text[: _MAX_LABEL - 1]}…"


def _png(figure: Figure) -> str:
    return f"data:image/png;base64,{base64.b64encode(as_png(figure)).decode()}"
