"""What fitted members are worth, out of fold: the four measures, plots, the worst cases as pictures, and the model cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ensemble.evaluate.run import write_scores
from ensemble.evaluate.scores import MEASURES, Score, score_masks
from ensemble.geometry import Triple
from ensemble.text import escape_invisible
from ensemble.types import BoolArray
from training import bank
from training.bank import Scan
from training.calibrate import Patient, Rule
from training.folds import Folds

SCORES, WORST = "out_of_fold.csv", "out_of_fold_worst.png"
SHOWN = 6


@dataclass(frozen=True)
class Tested:
    """A scan, and what members that were not trained on it say."""

    scan: Scan
    fold: int
    patient: Patient
    spacing_zyx_mm: Triple

    def score(self, rule: Rule) -> Score:
        """The measurements of the mask from one rule."""
        return score_masks(self.scan.name, self.patient.lesion, self.patient.mask(rule), self.spacing_zyx_mm)


@dataclass(frozen=True)
class Fitted:
    """The fitted members, their rules, and what their model cards state."""

    members: tuple[str, ...]
    folds: Folds
    rules: tuple[Rule, ...]
    """For each fold: chosen on the others."""
    rule: Rule
    """Chosen on all: what the weights folder has."""
    about: Mapping[str, Any]
    licence: str
    consent: str


def write_reports(fitted: Fitted, tested: Sequence[Tested], weights: Path) -> None:
    """Table, summary, plots and worst cases of the ensemble; a card for each member."""
    scores = [one.score(fitted.rules[one.fold]) for one in tested]
    write_scores(scores, [], weights / SCORES)
    worst = sorted(zip(tested, scores, strict=True), key=lambda pair: (pair[1].dice, pair[1].case))[:SHOWN]
    draw_worst(worst, fitted.rules, weights / WORST)
    table = _table(fitted, tested)
    for member in fitted.members:
        (weights / member / "README.md").write_text(_card(member, fitted, table), encoding="utf-8")


def _table(fitted: Fitted, tested: Sequence[Tested]) -> str:
    """Means by member and of the ensemble, before and after calibration, as Markdown."""
    lines = ["| out of fold | Dice | lesion F1 | AVD ml | ALCD |", "| --- | ---: | ---: | ---: | ---: |"]
    whole = {"ensemble": fitted.members} if len(fitted.members) > 1 else {}
    for name, members in {**{member: (member,) for member in fitted.members}, **whole}.items():
        for title, rules in (("all at 0.5", _usual(fitted)), ("calibrated on the other folds", fitted.rules)):
            scores = []
            for one in tested:
                part = replace(one.patient, probabilities={m: one.patient.probabilities[m] for m in members})
                scores.append(replace(one, patient=part).score(rules[one.fold]))
            means = [float(np.mean([getattr(score, key) for score in scores])) for key in MEASURES]
            lines.append(f"| {name}, {title} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    return "\n".join(lines)


def _usual(fitted: Fitted) -> tuple[Rule, ...]:
    usual = Rule(dict.fromkeys(fitted.members, 0.5), fitted.rule.min_disputed_ml)
    return (usual,) * len(fitted.folds)


def _card(member: str, fitted: Fitted, table: str) -> str:
    about, volumes = fitted.about, [scan.lesion_ml for fold in fitted.folds for scan in fold]
    quartiles = ", ".join(f"{value:.2f}" for value in np.quantile(volumes, (0.25, 0.5, 0.75)))
    real = sum(scan.real for fold in fitted.folds for scan in fold)
    length = f"{about['steps']} steps" if about["steps"] is not None else f"{about['minutes']:g} minutes"
    rows = {
        "trained on": f"{about['scans']} scans of {about['patients']} patients ({real} scans of data sets, the rest simulated);"
        f" lesion ml, quartiles: {quartiles}; bank sha256 {about['bank_sha256']}",
        "simulated patients mixed in": f"{about['simulated_share']:.0%} of what was seen",
        "networks": f"{len(fitted.folds)} folds by patient, {length} each, seed {about['seed']}, from"
        f" {about['start_from'] or 'random weights'}, highest learning rate {about['rate']:g}",
        "decides": f"at 0.5 (its last layer was moved there from {fitted.rule.thresholds[member]:g}, chosen out of fold);"
        f" vote {fitted.rule.weights.get(member, 1.0):g}; no lesion below {fitted.rule.min_lesion_ml:g} ml",
        "licence": fitted.licence,
        "consent (statement of who trained it)": fitted.consent,
        "use": "research only; not a medical device",
    }
    text = "\n".join(f"| {key} | {escape_invisible(value).replace('|', '/')} |" for key, value in rows.items())
    return (
        f"# {member}, fitted by training.fit\n\n| | |\n| --- | --- |\n{text}\n\n## Evaluation\n\n"
        f"Each patient is measured by the network that was not trained on it; {SCORES} in the weights folder has every case.\n\n{table}\n"
    )


def draw_worst(worst: Sequence[tuple[Tested, Score]], rules: Sequence[Rule], path: Path) -> None:
    """DWI where true (green) and found (red) masks differ most, of the cases with the lowest Dice."""
    figure = Figure(figsize=(3.2 * len(worst), 3.6), facecolor="black", layout="constrained")
    axes = figure.subplots(1, len(worst), squeeze=False)[0]
    for ax, (one, score) in zip(axes, worst, strict=True):
        case, truth = bank.as_prepared(one.scan.path)
        dwi, found = case.tissue_normalized[bank.CHANNELS[0]].array, _uncut(one, rules[one.fold], truth)
        row = int((truth ^ found).sum(axis=(1, 2)).argmax())
        ax.imshow(dwi[row], cmap="gray", vmin=0, vmax=3, origin="lower", aspect="equal")
        for mask, colour in ((truth[row], "#34c759"), (found[row], "#ff3b30")):
            if mask.any() and not mask.all():
                ax.contour(mask.astype(float), levels=[0.5], colors=colour, linewidths=1)
        ax.set_axis_off()
        title = f"{escape_invisible(score.case)}\nDice {score.dice:.2f}, {score.truth_ml:.2f} ml, found {score.predicted_ml:.2f}"
        ax.set_title(title, color="white", fontsize=8, parse_math=False)
    FigureCanvasAgg(figure).print_png(str(path))


def _uncut(one: Tested, rule: Rule, truth: BoolArray) -> BoolArray:
    """The mask on the whole scan."""
    whole = np.zeros(truth.shape, bool)
    whole[one.patient.box] = one.patient.mask(rule)
    return whole
