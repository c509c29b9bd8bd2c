"""Small disputed findings, true or false, told apart in the stable modes: `python -m training.spectral.components`.

The product drops them all (docs/adr/0015). A linear rule in the K(N) modes, learnt on the specks of simulated patients of two heads, keeps
those that it takes for lesions; it is measured on patients of the other two heads, and on real cases with a truth. A speck is true
where it touches a true lesion. Keeping one raises the lesion F1 where more than F1 / 2 of what is kept is true.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np

from ensemble.spectral.embeddings import CaseEmbeddings, RegionKind
from ensemble.spectral.theory import auc, class_separation
from ensemble.types import AnyArray
from training.command import call
from training.spectral.kept import add_kept, folder_of, kept
from training.spectral.patients import patients
from training.trust_patients import MEASURED_HEADS

SHIPPED = ("iso3d", "slice2d", "flair3d")


@dataclass(frozen=True)
class Specks:
    """Features of specks (N, D), and which are true lesions (N,)."""

    features: AnyArray
    true: AnyArray


@dataclass(frozen=True)
class Rule:
    """Keeps a small component if its product with the direction exceeds the limit."""

    direction: AnyArray
    limit: float
    modes: int

    def scores(self, specks: Specks) -> AnyArray:
        """Score of each component; above 0 it is kept."""
        return np.asarray(specks.features @ self.direction - self.limit)


def small_disputed_of(cases: Sequence[CaseEmbeddings], members: Sequence[str], stage: int) -> Specks:
    """All specks of some cases in one stage (from 1) of the members, side by side."""
    rows, true = [], []
    for case in cases:
        for number, region in enumerate(case.regions):
            if region.kind is RegionKind.SMALL_DISPUTED:
                rows.append(np.concatenate([case.stages[member][stage - 1][number] for member in members]))
                true.append(region.true)
    return Specks(np.array(rows, np.float64).reshape(len(rows), -1), np.array(true, bool))


def learn(specks: Specks) -> Rule | None:
    """The linear rule for two Gaussians of one covariance and these shares of either; None where a class has fewer than two."""
    false, true = specks.features[~specks.true], specks.features[specks.true]
    if min(len(false), len(true)) < 2:
        return None
    apart = class_separation(false, true)
    direction = apart.direction()
    middle = float(direction @ (apart.means[0] + apart.means[1])) / 2
    return Rule(direction, middle + log(len(false) / len(true)), apart.used)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m training.spectral.components", description=__doc__)
    add_kept(parser)
    parser.add_argument("--real", type=Path, help="folder of real cases that training.spectral.patients looked at, too")
    parser.add_argument("--stage", type=int, default=3, help="of the encoders, from 1 (default: %(default)s)")
    options = parser.parse_args(arguments)
    return call(lambda: _print(options))


def _print(options: argparse.Namespace) -> int:
    heads = {patient.name: patient.head for patient in patients(options.simulated)}
    cases = [case for case in kept(options) if set(SHIPPED) <= set(case.stages)]
    unseen = [case for case in cases if heads[case.name] in MEASURED_HEADS]
    learning = [case for case in cases if heads[case.name] not in MEASURED_HEADS]
    real = _real(folder_of(options), options.real) if options.real else []
    groups = {f"simulated, {len(unseen)} unseen patients": unseen, **{case.name: [case] for case in real}}
    print("| features | K(N) | learnt on (true, false) | measured on | true | false | true kept | false kept | AUC |")
    print("| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for members in (SHIPPED, *((member,) for member in SHIPPED)):
        known = small_disputed_of(learning, members, options.stage)
        rule = learn(known)
        if rule is None:
            print(f"| {' + '.join(members)} | too few specks to learn from |" + " |" * 7)
            continue
        for name, group in groups.items():
            found = small_disputed_of(group, members, options.stage)
            scores = rule.scores(found) if len(found.true) else np.zeros(0)
            kept_ones = scores > 0
            told = (
                auc(scores[~found.true], scores[found.true]) if 0 < found.true.sum() < len(found.true) else float("nan")
            )
            print(
                f"| {' + '.join(members)} | {rule.modes} | {known.true.sum()}, {(~known.true).sum()} | {name} | {found.true.sum()} "
                f"| {(~found.true).sum()} | {(kept_ones & found.true).sum()} | {(kept_ones & ~found.true).sum()} | {told:.2f} |"
            )
    return 0


def _real(folder: Path, cases: Path) -> list[CaseEmbeddings]:
    """Those with a truth."""
    names = sorted(path.name for path in cases.iterdir() if any(path.glob("lesion_gt.*")))
    return [CaseEmbeddings.read(folder / f"{name}.npz") for name in names if (folder / f"{name}.npz").exists()]


if __name__ == "__main__":
    raise SystemExit(main())
