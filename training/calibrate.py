"""Choose where each member decides, on simulated patients, and write it into its weights: `python -m training.calibrate --apply`.

Losses that balance lesion and background, and few hours of training, leave networks that ask for more than even odds before they vote.
For each member a threshold is chosen in turn, until none changes, that gives the shipped ensemble (majority of the members, small
disputed components left out) the highest mean of Dice and lesion F1 on patients of the validation set beyond those that
`training.evaluate` reports on. Thresholds under which more than one in ten lesion-free patients would get more than 0.3 ml are left
aside. `--apply` adds the threshold's log odds to the biases of the network's last layer, so that 0.5 stays where every member decides:
probabilities, gates and votes need no other rule.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ensemble.config import SHIPPED_WEIGHTS
from ensemble.families.base import InferenceSettings
from ensemble.families.registry import family_of
from ensemble.families.spec import MIN_DISPUTED_ML
from ensemble.fusion import drop_disputed_components, drop_small_components, majority_vote, mean_probability
from ensemble.logging_setup import set_up_logging
from ensemble.members.manifest import find_members
from ensemble.metrics import dice, lesion_f1
from ensemble.prepare.case import prepare_raw
from ensemble.types import AnyArray, BoolArray, FloatArray, ignore_progress
from ensemble.weights.checkpoints import read_checkpoint
from training.drafts import draft_of
from training.evaluate import simulated_cases
from training.manifest import write_manifest

log = logging.getLogger(f"ensemble.{__name__}")

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
#: Largest mask (ml) of a lesion-free patient, and the fraction of such patients that may exceed it.
MAX_FALSE_ML, MAX_FALSE_SHARE = 0.3, 0.1
#: What a vote may count, and volumes (ml) below which a lesion may not count.
WEIGHTS, MIN_ML = (1.0, 2.0, 3.0), (0.0, 0.02, 0.05, 0.1, 0.2)
LAST_LAYER = "decoder.seg_layers."


@dataclass(frozen=True)
class Rule:
    """How probabilities become a mask."""

    thresholds: Mapping[str, float]
    """Above which each member votes."""
    min_disputed_ml: float
    weights: Mapping[str, float] = field(default_factory=dict)
    """What each member's vote counts; 1 where none is given."""
    min_lesion_ml: float = 0.0

    def __str__(self) -> str:
        said = [f"{name} {threshold:g}" for name, threshold in self.thresholds.items()]
        said += [f"vote of {name} {weight:g}" for name, weight in self.weights.items() if weight != 1]
        return ", ".join(said + [f"no lesion below {self.min_lesion_ml:g} ml"] * bool(self.min_lesion_ml))


@dataclass(frozen=True)
class Patient:
    """One patient, and what the members say."""

    lesion: BoolArray
    probabilities: Mapping[str, FloatArray]
    """float16 (z, y, x) by member."""
    voxel_ml: float
    box: tuple[slice, ...] = (slice(None),) * 3
    """Of the whole scan that this is cut to."""

    def mask(self, rule: Rule) -> BoolArray:
        """The mask where each member votes above its threshold, as `ensemble.fusion` fuses what the shifted networks say."""
        said = list(self.probabilities.items())
        ballots = np.stack([probability > rule.thresholds[name] for name, probability in said])
        weights = [rule.weights.get(name, 1.0) for name, _ in said]
        shifted = [shifted_probability(probability, rule.thresholds[name]) for name, probability in said]
        mean = mean_probability(shifted, weights)
        whole = majority_vote(ballots, weights, mean)
        large, _ = drop_small_components(whole, rule.min_lesion_ml / self.voxel_ml)
        disputable = rule.min_disputed_ml if len(said) > 1 else 0.0
        return drop_disputed_components(large, mean, self.voxel_ml, disputable)[0]

    def cut(self) -> Patient:
        """The same where any member may ever vote, or a lesion is: nothing that is measured changes."""
        voted = [probability > min(THRESHOLDS) for probability in self.probabilities.values()]
        inside = np.argwhere(np.any([self.lesion, *voted], axis=0))
        low, high = (inside.min(0), inside.max(0) + 1) if len(inside) else (np.zeros(3, int), np.ones(3, int))
        box = tuple(slice(start, end) for start, end in zip(low, high, strict=True))
        parts = {name: probability[box].copy() for name, probability in self.probabilities.items()}
        return Patient(self.lesion[box].copy(), parts, self.voxel_ml, box)


def shifted_probability(probability: FloatArray, threshold: float) -> FloatArray:
    """Return the network's probabilities (float32) after `shift` has moved its threshold from `threshold` to 0.5."""
    lesion = probability.astype(np.float32) * np.float32(1 - threshold)
    return np.asarray(lesion / (lesion + (1 - probability.astype(np.float32)) * np.float32(threshold)))


@dataclass(frozen=True)
class Worth:
    """The measurements for one choice of thresholds."""

    dice: float
    f1: float
    recall: float
    precision: float
    false_share: float
    """Of lesion-free patients with more than MAX_FALSE_ML."""

    @property
    def score(self) -> float:
        """What is maximised."""
        return (self.dice + self.f1) / 2 if self.false_share <= MAX_FALSE_SHARE else -self.false_share

    def __str__(self) -> str:
        return (
            f"Dice {self.dice:.3f}, lesion F1 {self.f1:.3f}, recall {self.recall:.3f}, precision {self.precision:.3f},"
            f" lesion-free above {MAX_FALSE_ML} ml {self.false_share:.0%}"
        )


def worth_of(patients: Sequence[Patient], rule: Rule) -> Worth:
    """The measurements of what a rule makes of the patients."""
    return worth_of_masks((patient.lesion, patient.mask(rule), patient.voxel_ml) for patient in patients)


def worth_of_masks(cases: Iterable[tuple[BoolArray, BoolArray, float]]) -> Worth:
    """Means over patients with a lesion, the share of false masks over those without.

    `cases`: of each patient the true mask and the mask (z, y, x), and the volume of a voxel (ml).
    """
    scores: list[tuple[float, float, float]] = []
    precisions: list[float] = []
    false: list[bool] = []
    for lesion, mask, voxel_ml in cases:
        if not lesion.any():
            false.append(mask.sum() * voxel_ml > MAX_FALSE_ML)
            continue
        hit = (mask & lesion).sum()
        scores.append((dice(lesion, mask), lesion_f1(lesion, mask), hit / lesion.sum()))
        precisions += [hit / mask.sum()] if mask.any() else []
    dice_mean, f1, recall = (float(mean) for mean in np.mean(scores, axis=0)) if scores else (0.0, 0.0, 0.0)
    return Worth(
        dice_mean,
        f1,
        recall,
        float(np.mean(precisions)) if precisions else float("nan"),
        float(np.mean(false)) if false else 0.0,
    )


def choose_thresholds(patients: Sequence[Patient], min_disputed_ml: float) -> Rule:
    """The rule with equal votes, and the thresholds: one member's after the other's is set to its best, until none changes."""
    names, changed = list(patients[0].probabilities), True
    chosen = Rule(dict.fromkeys(names, 0.5), min_disputed_ml)
    best = worth_of(patients, chosen)
    log.info("all at 0.5: %s", best)
    while changed:
        before = chosen
        for name in names:
            nearest = sorted(THRESHOLDS, key=lambda threshold: abs(threshold - 0.5))
            tried = [replace(chosen, thresholds={**chosen.thresholds, name: threshold}) for threshold in nearest]
            chosen, best = _better(patients, chosen, best, tried)
            log.info("%s: %s", chosen, best)
        changed = chosen != before
    return chosen


def choose_rule(patients: Sequence[Patient], min_disputed_ml: float) -> Rule:
    """Thresholds first, then what votes count and from which volume on a lesion is one."""
    chosen = choose_thresholds(patients, min_disputed_ml)
    best = worth_of(patients, chosen)
    names = list(chosen.thresholds)
    for name in names if len(names) > 1 else []:
        tried = [replace(chosen, weights={**chosen.weights, name: weight}) for weight in WEIGHTS]
        chosen, best = _better(patients, chosen, best, tried)
    tried = [replace(chosen, min_lesion_ml=least) for least in MIN_ML]
    chosen, best = _better(patients, chosen, best, tried)
    log.info("%s: %s", chosen, best)
    return chosen


def _better(patients: Sequence[Patient], chosen: Rule, best: Worth, tried: Sequence[Rule]) -> tuple[Rule, Worth]:
    """The best of some rules and the one so far."""
    for rule in tried:
        found = worth_of(patients, rule)
        if found.score > best.score + 1e-4:
            chosen, best = rule, found
    return chosen, best


def predicted(weights: Path, first: int, count: int, shared: Path, cache: Path | None) -> list[Patient]:
    """Patients `first` to `first + count` of the validation set with each member's probabilities, without mirroring."""
    settings = InferenceSettings(tta="none")
    members = [family_of(spec).load(spec, settings) for spec in find_members(weights)]
    patients = []
    cases = tqdm(simulated_cases(first + count, shared, cache), total=first + count, disable=None)
    for number, truth in enumerate(cases):
        if number < first or truth.mask is None:
            continue
        case = prepare_raw(truth.raw)
        probabilities: dict[str, AnyArray] = {
            member.name: member.predict(case, settings, ignore_progress).probability.array.astype(np.float16)
            for member in members
        }
        patients.append(Patient(truth.mask, probabilities, case.grid.voxel_ml))
    return patients


def shift(checkpoint: Path, threshold: float) -> None:
    """Move a network's decision from a lesion probability of `threshold` to 0.5, in the biases of its last layer."""
    content = read_checkpoint(checkpoint)
    weights = content["network_weights"]
    biases = [name for name in weights if LAST_LAYER in name and name.endswith(".bias")]
    last = max(biases, key=lambda name: int(name.split(LAST_LAYER)[1].split(".")[0]))
    bias = weights[last]
    odds = math.log((1 - threshold) / threshold)
    weights[last] = (bias.float() + torch.tensor([-odds / 2, odds / 2])).to(bias.dtype)
    with draft_of(checkpoint) as draft:
        torch.save(content, draft)


def main() -> None:
    """Choose thresholds, print them, and apply them on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--first", type=int, default=60, help="of the validation set; those before are reported on")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--cache", type=Path, help="folder in which simulated patients are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--apply", action="store_true", help="write the thresholds into the weights, and the manifest")
    options = parser.parse_args()
    set_up_logging()
    torch.set_num_threads(options.threads)
    patients = predicted(options.weights, options.first, options.count, options.shared, options.cache)
    chosen = choose_thresholds(patients, MIN_DISPUTED_ML)
    if not options.apply:
        return
    for name, threshold in chosen.thresholds.items():
        for checkpoint in sorted((options.weights / name).glob("fold_*/checkpoint_final.pth")):
            shift(checkpoint, threshold)
    write_manifest(options.weights)


if __name__ == "__main__":
    main()
