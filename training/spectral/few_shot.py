"""How many cases a linear rule needs: `python -m training.spectral.few_shot`, of the embeddings that `training.spectral.patients` keeps.

Windows with a lesion against windows without, in one stage of each encoder: N windows are drawn, half of either class; those of
*other patients* measure the AUC. Twenty draws; the same windows for every method.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.covariance import OAS, LedoitWolf

from ensemble.spectral.diagnosis import FeatureSample, select_features
from ensemble.spectral.embeddings import CaseEmbeddings, RegionKind
from ensemble.spectral.theory import (
    auc,
    class_separation,
    few_shot_auc,
    fit_zeta,
    predicted_auc,
    zeta_energy,
)
from ensemble.types import AnyArray
from training.command import call
from training.spectral.filtering import ZetaFilter
from training.spectral.kept import add_kept, kept

SIZES, DRAWS = (10, 20, 40, 80, 160), 20
#: Ranks that cross-validation chooses from, and its parts.
RANKS, FOLDS = (1, 2, 3, 5, 8, 12, 20, 32), 5

Rule = Callable[[AnyArray, AnyArray], AnyArray]
"""Of windows without and with a lesion (n, D): a direction (D,); larger products with it speak for a lesion."""


def filter_rule(first: AnyArray, second: AnyArray) -> tuple[AnyArray, int]:
    """Zeta-based filtering, the nearest mean in the modes that are kept; and how many those are."""
    both, labels = np.concatenate([first, second]), np.repeat([0, 1], [len(first), len(second)])
    chosen = ZetaFilter()
    modes = chosen.fit(both, labels).transform(both)
    apart = modes[labels == 1].mean(axis=0) - modes[labels == 0].mean(axis=0)
    scale = np.where(chosen.eigenvalues_ > 0, chosen.eigenvalues_, np.inf) ** -0.5
    return np.asarray((apart * scale) @ chosen.components_), chosen.n_modes_


def ledoit_wolf(first: AnyArray, second: AnyArray) -> AnyArray:
    """Shrinkage of Ledoit and Wolf (2004)."""
    return _with(LedoitWolf(assume_centered=True), first, second)


def oas(first: AnyArray, second: AnyArray) -> AnyArray:
    """Oracle approximating shrinkage (Chen et al. 2010)."""
    return _with(OAS(assume_centered=True), first, second)


def _with(estimator: Any, first: AnyArray, second: AnyArray) -> AnyArray:
    covariance = estimator.fit(_centred(first, second)).covariance_
    return np.asarray(np.linalg.pinv(covariance, hermitian=True) @ (second.mean(axis=0) - first.mean(axis=0)))


def pseudo_inverse(first: AnyArray, second: AnyArray) -> AnyArray:
    """Plain Mahalanobis: the pseudo-inverse of the sample covariance."""
    return _truncated(first, second, [None])[0]


def cross_validated(first: AnyArray, second: AnyArray) -> AnyArray:
    """Principal components, with the number of components chosen by five-fold cross-validation."""
    parts = min(FOLDS, len(first), len(second))
    ranks = [rank for rank in RANKS if rank <= len(first) + len(second) - 2 - parts] or [1]
    scores = dict.fromkeys(ranks, 0.0)
    for part in range(parts):
        learnt = [sample[np.arange(len(sample)) % parts != part] for sample in (first, second)]
        held = [sample[np.arange(len(sample)) % parts == part] for sample in (first, second)]
        for rank, rule in zip(ranks, _truncated(learnt[0], learnt[1], ranks), strict=True):
            scores[rank] += auc(held[0] @ rule, held[1] @ rule)
    return _truncated(first, second, [max(scores, key=lambda rank: scores[rank])])[0]


def _truncated(first: AnyArray, second: AnyArray, ranks: Sequence[int | None]) -> list[AnyArray]:
    """Return the linear rule in each number of principal components (None: all)."""
    _, singular, modes = np.linalg.svd(_centred(first, second), full_matrices=False)
    used = singular > 1e-10 * singular[0]
    along = modes[used] @ (second.mean(axis=0) - first.mean(axis=0)) / singular[used] ** 2
    return [np.asarray(along[:rank] @ modes[used][:rank]) for rank in ranks]


def _centred(first: AnyArray, second: AnyArray) -> AnyArray:
    return np.concatenate([first - first.mean(axis=0), second - second.mean(axis=0)])


FILTER = "zeta filter"
OTHERS: Mapping[str, Rule] = {
    "Ledoit-Wolf": ledoit_wolf,
    "OAS": oas,
    "PCA, rank cross-validated": cross_validated,
    "pseudo-inverse": pseudo_inverse,
}


@dataclass(frozen=True)
class Row:
    """One sample size: AUC of each rule in each draw, and the AUC that theory predicts."""

    n: int
    aucs: Mapping[str, tuple[float, ...]]
    modes: float
    """Mean K(N)."""
    predicted: float
    """Phi(sqrt(E_K / 2)) of all windows' energies, in the mean K(N) modes."""
    by_zeta: float
    """The same of the zeta form fitted to all windows' energies."""
    few_shot: float
    """What is to be expected of so few windows."""

    def summary(self, name: str) -> tuple[float, float, float]:
        """Mean AUC of a rule, and a 95 % interval of the mean."""
        values = np.array(self.aucs[name])
        half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
        return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def measure(
    without: FeatureSample, lesion: FeatureSample, sizes: Sequence[int], draws: int, seed: int = 0
) -> list[Row]:
    """Return the AUC of every rule by the number of training windows; "all" is four fifths of the patients."""
    whole = class_separation(without.features, lesion.features, seed)
    rows = []
    patients = np.unique(np.concatenate([without.cases, lesion.cases]))
    for n in (*sizes, 0):
        aucs: dict[str, list[float]] = {name: [] for name in (FILTER, *OTHERS)}
        modes, counts = [], (0, 0)
        for number in range(draws):
            draw = np.random.default_rng([seed, number])
            learning = draw.choice(patients, round(0.8 * len(patients)), replace=False)
            parts = [_split(sample, learning, n // 2, draw) for sample in (without, lesion)]
            (first, held_first), (second, held_second) = parts
            counts = len(first), len(second)
            directions, known = {}, filter_rule(first, second)
            directions[FILTER], used = known
            directions |= {name: rule(first, second) for name, rule in OTHERS.items()}
            modes.append(used)
            for name, direction in directions.items():
                aucs[name].append(auc(held_first @ direction, held_second @ direction))
        used = max(1, round(float(np.mean(modes))))
        scale, exponent = fit_zeta(whole.energies[:used])
        energy = whole.energy(used)
        rows.append(
            Row(
                sum(counts),
                {name: tuple(values) for name, values in aucs.items()},
                float(np.mean(modes)),
                predicted_auc(energy),
                predicted_auc(zeta_energy(scale, exponent, used)),
                few_shot_auc(energy, used, counts),
            )
        )
    return rows


def _split(sample: FeatureSample, learning: AnyArray, n: int, draw: np.random.Generator) -> tuple[AnyArray, AnyArray]:
    """So many (0: all) windows of the learning patients, and all of the others."""
    known = np.isin(sample.cases, learning)
    pool = sample.features[known]
    return pool if n == 0 else pool[draw.permutation(len(pool))[:n]], sample.features[~known]


def format_table(rows: Sequence[Row]) -> str:
    """Markdown; the best rule of each row in bold, with those whose interval reaches its mean."""
    names = [FILTER, *OTHERS]
    lines = [
        "| N | K(N) | " + " | ".join(names) + " | E_K | zeta form | of so few |",
        "| ---: | ---: |" + " --- |" * len(names) + " ---: |" * 3,
    ]
    for row in rows:
        told = {name: row.summary(name) for name in names}
        best = max(mean for mean, _, _ in told.values())
        cells = []
        for mean, low, high in told.values():
            mark = "**" if high >= best else ""
            cells.append(f"{mark}{mean:.3f}{mark} ({low:.3f} to {high:.3f})")
        lines.append(
            f"| {row.n} | {row.modes:.1f} | {' | '.join(cells)} | {row.predicted:.3f} | {row.by_zeta:.3f} | {row.few_shot:.3f} |"
        )
    return "\n".join(lines)


def windows(cases: Sequence[CaseEmbeddings], member: str, stage: int = -1) -> tuple[FeatureSample, FeatureSample]:
    """Windows without and with a lesion in one stage, the deepest by default."""
    own = [case for case in cases if member in case.stages]
    number = stage % len(own[0].stages[member])
    return select_features(own, member, number, RegionKind.WITHOUT_LESION), select_features(
        own, member, number, RegionKind.LESION
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table a member, and keep the numbers."""
    parser = argparse.ArgumentParser(prog="python -m training.spectral.few_shot", description=__doc__)
    add_kept(parser)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument(
        "--stage", type=int, default=3, help="of the encoder, from 1 (default: %(default)s, cells of 8 mm)"
    )
    parser.add_argument("--members", nargs="+", metavar="NAME", help="all by default")
    parser.add_argument("--json", type=Path, help="where to write every AUC")
    options = parser.parse_args(arguments)
    return call(lambda: _print(options))


def _print(options: argparse.Namespace) -> int:
    cases, told = kept(options), {}
    for member in options.members or dict.fromkeys(name for case in cases for name in case.stages):
        without, lesion = windows(cases, member, options.stage - 1)
        rows = measure(without, lesion, SIZES, options.draws)
        print(
            f"\n{member}, {len(lesion.features)} windows with a lesion, {len(without.features)} without:\n\n{format_table(rows)}",
            flush=True,
        )
        told[member] = [vars(row) for row in rows]
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
