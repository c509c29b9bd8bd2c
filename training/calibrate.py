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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.families.base import InferenceSettings
from ensemble.families.registry import family_of
from ensemble.fusion import majority, without_specks
from ensemble.members.manifest import find_members
from ensemble.metrics import dice, lesion_f1
from ensemble.prepare.case import prepare
from ensemble.types import AnyArray, BoolArray, FloatArray, ignore_progress
from ensemble.weights.checkpoints import read_checkpoint
from training.evaluate import simulated_cases
from training.manifest import write_manifest

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
#: What a mask of a lesion-free patient may hold (ml), and how many such patients may have more.
MAX_FALSE_ML, MAX_FALSE_SHARE = 0.3, 0.1
LAST_LAYER = "decoder.seg_layers."


@dataclass(frozen=True)
class Patient:
    """One simulated patient, and what the members say."""

    lesion: BoolArray
    probabilities: Mapping[str, FloatArray]
    """float16 (z, y, x) by member."""
    voxel_ml: float

    def mask(self, thresholds: Mapping[str, float], speck_ml: float) -> BoolArray:
        """The fused mask where each member votes above its threshold. Ties can't be: the members are three."""
        ballots = np.stack([probability > thresholds[name] for name, probability in self.probabilities.items()])
        votes = ballots.sum(axis=0, dtype=np.uint8)
        whole = majority(votes, len(ballots), np.zeros(votes.shape, np.float32))
        return without_specks(whole, ballots, speck_ml / self.voxel_ml)[0]


@dataclass(frozen=True)
class Worth:
    """What thresholds give."""

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


def worth(patients: Sequence[Patient], thresholds: Mapping[str, float], speck_ml: float) -> Worth:
    """Means over patients with a lesion, the share of false masks over those without."""
    scores: list[tuple[float, float, float]] = []
    precisions: list[float] = []
    false: list[bool] = []
    for patient in patients:
        mask = patient.mask(thresholds, speck_ml)
        if not patient.lesion.any():
            false.append(mask.sum() * patient.voxel_ml > MAX_FALSE_ML)
            continue
        hit = (mask & patient.lesion).sum()
        scores.append((dice(patient.lesion, mask), lesion_f1(patient.lesion, mask), hit / patient.lesion.sum()))
        precisions += [hit / mask.sum()] if mask.any() else []
    dice_mean, f1, recall = (float(mean) for mean in np.mean(scores, axis=0))
    return Worth(
        dice_mean,
        f1,
        recall,
        float(np.mean(precisions)) if precisions else float("nan"),
        float(np.mean(false)) if false else 0.0,
    )


def choose(patients: Sequence[Patient], speck_ml: float) -> dict[str, float]:
    """The thresholds by member: one after the other is set to its best, until none changes."""
    names = list(patients[0].probabilities)
    chosen, changed = dict.fromkeys(names, 0.5), True
    best = worth(patients, chosen, speck_ml)
    print(f"all at 0.5: {best}")
    while changed:
        changed = False
        for name in names:
            for threshold in sorted(THRESHOLDS, key=lambda threshold: abs(threshold - 0.5)):
                tried = worth(patients, chosen | {name: threshold}, speck_ml)
                if tried.score > best.score + 1e-4:
                    chosen, best, changed = chosen | {name: threshold}, tried, True
            print(f"{', '.join(f'{member} {threshold}' for member, threshold in chosen.items())}: {best}", flush=True)
    return chosen


def predicted(weights: Path, first: int, count: int, shared: Path, cache: Path | None) -> list[Patient]:
    """Patients `first` to `first + count` of the validation set with each member's probabilities, without mirroring."""
    settings = InferenceSettings(tta="none")
    members = [family_of(spec).load(spec, settings) for spec in find_members(weights)]
    patients = []
    cases = tqdm(simulated_cases(first + count, shared, cache), total=first + count, disable=None)
    for number, truth in enumerate(cases):
        if number < first or truth.mask is None:
            continue
        case = prepare(truth.raw)
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
    odds = log((1 - threshold) / threshold)
    weights[last] = (bias.float() + torch.tensor([-odds / 2, odds / 2])).to(bias.dtype)
    whole = checkpoint.with_suffix(".tmp")
    torch.save(content, whole)
    whole.replace(checkpoint)


def main() -> None:
    """Choose, print, and apply if told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--first", type=int, default=60, help="of the validation set; those before are reported on")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--cache", type=Path, help="folder in which simulated patients are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--apply", action="store_true", help="write the thresholds into the weights, and the manifest")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    patients = predicted(options.weights, options.first, options.count, options.shared, options.cache)
    chosen = choose(patients, RunConfig().speck_ml)
    if not options.apply:
        return
    for name, threshold in chosen.items():
        for checkpoint in sorted((options.weights / name).glob("fold_*/checkpoint_final.pth")):
            shift(checkpoint, threshold)
    write_manifest(options.weights)


if __name__ == "__main__":
    main()
