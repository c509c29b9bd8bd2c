"""Diagnose each stage of an encoder from the embeddings of many cases; return numbers, a table and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemble.spectral.embeddings import CaseEmbeddings, RegionKind
from ensemble.spectral.theory import (
    PowerLaw,
    RecoverableModes,
    Separation,
    auc,
    class_separation,
    few_shot_auc,
    fit_power_law,
    fit_zeta,
    observed_modes,
    predicted_auc,
    recoverable_modes,
    zeta_energy,
)
from ensemble.trust.spectrum import eigenmodes
from ensemble.types import AnyArray

#: Fewest cases, and fewest windows of a kind, for which results are reported.
MIN_CASES = MIN_WINDOWS = 10
#: Number of folds (by case) for cross-validating a classification rule.
PARTS = 5
_SHARES = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class FeatureSample:
    """Feature vectors, and the number of the case that each belongs to."""

    features: AnyArray
    """(N, D)."""
    cases: AnyArray
    """(N,) numbers of cases."""

    def of_cases(self, chosen: AnyArray) -> AnyArray:
        """Return the features of some cases (n, D)."""
        return self.features[np.isin(self.cases, chosen)]


@dataclass(frozen=True)
class FeatureSpectrum:
    """The eigenvalue spectrum that N feature vectors determine, and the number of modes that fewer vectors determine."""

    recovery: RecoverableModes
    law: PowerLaw | None
    by_size: tuple[tuple[int, float, float, float, float], ...]
    """For each subset size: the mean number n of vectors; the fractional K(n) predicted from the whole spectrum; mean and 95 % interval of
    K over random subsets of the cases, drawn without replacement."""

    @property
    def dimensions(self) -> int:
        """D."""
        return len(self.recovery.spectrum)


@dataclass(frozen=True)
class ClassContrast:
    """How well the features separate two classes of windows."""

    separation: Separation
    measured: float
    """Cross-validated AUC (five folds by case) of a linear rule in the K(N) modes; nan if a fold lacks a class."""
    scale: float
    exponent: float
    """Parameters of the zeta form: E_K = scale * zeta_K(exponent)."""

    @property
    def zeta_auc(self) -> float:
        """AUC that the zeta form predicts."""
        return predicted_auc(zeta_energy(self.scale, self.exponent, self.separation.used))

    @property
    def foretold(self) -> float:
        """The AUC expected of a rule that is fitted on this number of windows."""
        separation = self.separation
        return few_shot_auc(separation.energy(), separation.used, separation.counts)


@dataclass(frozen=True)
class StageDiagnosis:
    """The results for one stage of one member's encoder."""

    member: str
    stage: int
    """Number of the stage, from 1."""
    brain: FeatureSpectrum
    lesion: FeatureSpectrum | None
    presence: ClassContrast | None
    """Windows with a lesion against windows without."""
    size: ClassContrast | None
    """Lesions above the median volume against lesions below."""


def diagnose(cases: Sequence[CaseEmbeddings], draws: int = 20, seed: int = 0) -> list[StageDiagnosis]:
    """Return the results for each encoder stage of each member that embedded at least `MIN_CASES` cases.

    K(N) is the number of covariance eigenmodes that N feature vectors determine. `draws` is the number of random subsets of the cases, for
    each subset size, from which its mean and 95 % interval are estimated.
    """
    members = dict.fromkeys(name for case in cases for name in case.stages)
    found = []
    for member in members:
        own = [case for case in cases if member in case.stages]
        if len(own) < MIN_CASES:
            continue
        for stage in range(len(own[0].stages[member])):
            found.append(_diagnose(own, member, stage, draws, seed))
    return found


def select_features(
    cases: Sequence[CaseEmbeddings], member: str, stage: int, kind: RegionKind, ml: tuple[float, float] = (0, np.inf)
) -> FeatureSample:
    """Return the features (N, D) of a stage for all regions of one kind whose volume is in the half-open interval `ml`."""
    rows, numbers = [], []
    for number, case in enumerate(cases):
        for region, features in zip(case.regions, case.stages[member][stage], strict=True):
            if region.kind is kind and ml[0] <= region.ml < ml[1] and np.isfinite(features).all():
                rows.append(features)
                numbers.append(number)
    width = cases[0].stages[member][stage].shape[1]
    return FeatureSample(np.array(rows, np.float64).reshape(len(rows), width), np.array(numbers, int))


def median_lesion_ml(cases: Sequence[CaseEmbeddings]) -> float:
    """Return the median volume (ml) of all lesions of all cases; 0 if there are none."""
    return float(np.median([r.ml for case in cases for r in case.regions if r.kind is RegionKind.LESION] or [0.0]))


def _diagnose(cases: Sequence[CaseEmbeddings], member: str, stage: int, draws: int, seed: int) -> StageDiagnosis:
    def of(kind: RegionKind, low: float = 0.0, high: float = np.inf) -> FeatureSample:
        return select_features(cases, member, stage, kind, (low, high))

    lesion, middle = of(RegionKind.LESION), median_lesion_ml(cases)
    return StageDiagnosis(
        member,
        stage + 1,
        feature_spectrum(of(RegionKind.BRAIN), draws, seed),
        feature_spectrum(lesion, draws, seed) if len(lesion.features) >= MIN_WINDOWS else None,
        class_contrast(of(RegionKind.WITHOUT_LESION), lesion, seed),
        class_contrast(of(RegionKind.LESION, 0, middle), of(RegionKind.LESION, middle), seed),
    )


def feature_spectrum(sample: FeatureSample, draws: int, seed: int = 0) -> FeatureSpectrum:
    """Estimate the spectrum of a sample, and K(n) on random subsets of its cases."""
    recovery = count_recoverable_modes(sample.features, seed)
    draw, cases = np.random.default_rng(seed), np.unique(sample.cases)
    by_size = []
    for share in _SHARES:
        sizes, counts = [], []
        for _ in range(draws):
            part = sample.of_cases(draw.choice(cases, round(share * len(cases)), replace=False))
            if len(part) >= 3:
                sizes.append(len(part))
                counts.append(count_recoverable_modes(part, seed).crossing)
        if not sizes:
            continue
        n = round(float(np.mean(sizes)))
        low, high = np.quantile(counts, [0.025, 0.975])
        by_size.append((n, recovery.at(n - 1, seed).crossing, float(np.mean(counts)), float(low), float(high)))
    return FeatureSpectrum(
        recovery,
        fit_power_law(recovery.spectrum, recovery.n, observed_modes(recovery.n, len(recovery.spectrum))),
        tuple(by_size),
    )


def count_recoverable_modes(features: AnyArray, seed: int = 0) -> RecoverableModes:
    """Return how many modes of their covariance feature vectors (N, D) determine."""
    _, values, _ = eigenmodes(features)
    return recoverable_modes(values, len(features) - 1, features.shape[1], seed)


def class_contrast(first: FeatureSample, second: FeatureSample, seed: int = 0) -> ClassContrast | None:
    """Return how well the features separate two classes; None where either has fewer than `MIN_WINDOWS` windows."""
    if min(len(first.features), len(second.features)) < MIN_WINDOWS:
        return None
    separation = class_separation(first.features, second.features, seed)
    measured = []
    for part in range(PARTS):
        learnt = [sample.features[sample.cases % PARTS != part] for sample in (first, second)]
        held = [sample.features[sample.cases % PARTS == part] for sample in (first, second)]
        if min(map(len, learnt)) >= 2 and min(map(len, held)) >= 1:
            rule = class_separation(learnt[0], learnt[1], seed).direction()
            measured.append(auc(held[0] @ rule, held[1] @ rule))
    scale, exponent = fit_zeta(separation.energies[: separation.used])
    return ClassContrast(separation, float(np.mean(measured)) if measured else float("nan"), scale, exponent)


def format_table(stages: Sequence[StageDiagnosis]) -> str:
    """Return the results of all stages as Markdown: modes and spectra first, then how well classes separate."""
    lines = [
        "| member | stage | D | region | N | floor / l_1 | K(N) | gap / floor | power law l_k ~ k^-a, modes |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for stage in stages:
        for region, cloud in (("whole brain", stage.brain), ("lesion windows", stage.lesion)):
            if cloud is not None:
                lines.append(_cloud_row(stage, region, cloud))
    lines += [
        "",
        "| member | stage | classes | windows | K(N) | E_K | AUC predicted | by the zeta form (exponent) | of so few windows | measured |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for stage in stages:
        for classes, contrast in (("lesion or none", stage.presence), ("large or small", stage.size)):
            if contrast is not None:
                lines.append(_contrast_row(stage, classes, contrast))
    return "\n".join(lines)


def _cloud_row(stage: StageDiagnosis, region: str, cloud: FeatureSpectrum) -> str:
    recovery, law = cloud.recovery, cloud.law
    relative = recovery.floor / recovery.spectrum[0] if recovery.spectrum[0] > 0 else float("nan")
    held = f"a = {law.exponent:.2f}, {law.first} to {law.last}" if law else "none"
    return (
        f"| {stage.member} | {stage.stage} | {cloud.dimensions} | {region} | {recovery.n + 1} | {relative:.3f} | {recovery.crossing:.1f} "
        f"| {recovery.gap:.2f} | {held} |"
    )


def _contrast_row(stage: StageDiagnosis, classes: str, contrast: ClassContrast) -> str:
    separation = contrast.separation
    return (
        f"| {stage.member} | {stage.stage} | {classes} | {separation.counts[1]} + {separation.counts[0]} | {separation.used} "
        f"| {separation.energy():.2f} | {predicted_auc(separation.energy()):.3f} | {contrast.zeta_auc:.3f} ({contrast.exponent:.1f}) "
        f"| {contrast.foretold:.3f} | {contrast.measured:.3f} |"
    )


def as_json(stages: Sequence[StageDiagnosis]) -> list[dict[str, Any]]:
    """Return the results of all stages ready for JSON; unknown values are null."""
    return [
        {
            "member": stage.member,
            "stage": stage.stage,
            "dimensions": stage.brain.dimensions,
            "whole_brain": _cloud_json(stage.brain),
            "lesion_windows": _cloud_json(stage.lesion) if stage.lesion else None,
            "lesion_or_none": _contrast_json(stage.presence) if stage.presence else None,
            "large_or_small": _contrast_json(stage.size) if stage.size else None,
        }
        for stage in stages
    ]


def _cloud_json(cloud: FeatureSpectrum) -> Mapping[str, Any]:
    recovery, law = cloud.recovery, cloud.law
    return {
        "n": recovery.n + 1,
        "noise_floor": recovery.floor,
        "modes": recovery.modes,
        "crossing": recovery.crossing,
        "gap_in_floors": recovery.gap,
        "power_law": vars(law) if law else None,
        "by_size": [dict(zip(("n", "foretold", "mean", "low", "high"), row, strict=True)) for row in cloud.by_size],
        "spectrum": recovery.spectrum.tolist(),
    }


def _contrast_json(contrast: ClassContrast) -> Mapping[str, Any]:
    separation = contrast.separation
    return {
        "windows": list(separation.counts[::-1]),
        "modes": separation.used,
        "energy": separation.energy(),
        "energies": separation.energies.tolist(),
        "auc_predicted": predicted_auc(separation.energy()),
        "auc_of_zeta_form": contrast.zeta_auc,
        "zeta": {"scale": contrast.scale, "exponent": contrast.exponent},
        "auc_of_so_few": contrast.foretold,
        "auc_measured": contrast.measured if np.isfinite(contrast.measured) else None,
    }
