"""Measure how well each trust score, alone and combined, distinguishes bad masks from good ones, on patients not used for any fit.

    python -m benchmarks.trust [--only clean,spoilt,mimics,real] [--csv scores.csv] [--patients 150] [--spoilt 20]

The simulated patients have four heads that were kept out of the references and of the networks' last trainings. There are patients with
clean images; 20 of them with images spoilt in twelve ways and three strengths; stroke mimics and lesion-free patients; and the public
cases. Each patient is judged by a calibration on patients with the other heads, so that calibration and test share no head and no seed.
Networks run without mirroring. Images that the input checks refuse are segmented all the same, in this benchmark only, and listed apart.
Results are cached in `.train/trust`: an interrupted call continues, and `--have` prints the tables for the patients that are cached.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from scipy.stats import spearmanr

from ensemble.config import SHIPPED_WEIGHTS
from ensemble.errors import InputRefused
from ensemble.memory import keep_freed_memory
from ensemble.pipeline import Ensemble, segment_raw
from ensemble.prepare import case as preparation
from ensemble.prepare import skull
from ensemble.progress import SilentWatcher
from ensemble.spectral.theory import auc
from ensemble.trust.calibration import Verdict
from ensemble.trust.judge import TrustModel
from ensemble.trust.scores import DIRECTIONS, compute_trust_scores
from ensemble.types import AnyArray, BoolArray
from ensemble.volume import Volume
from training.anatomy import HELD_OUT_HEADS
from training.corruptions import CALIBRATION_KINDS, CORRUPTIONS, STRENGTHS
from training.drafts import draft_of
from training.evaluate import FALSE_ALARM_ML, Truth, as_raw, lesion_free_heads, real_cases
from training.mimics import MIMICS, mimic
from training.simulate import SHARED
from training.trust import CALIBRATIONS, FOLDER, REFERENCES, SPOILT, CalibrationData, open_ensemble
from training.trust_patients import (
    VALIDATION_SEED,
    Collection,
    Patient,
    SegmentedPatient,
    head_of,
    segmented_patient,
    spoilt_for_measurement,
    validation_patients,
)

GROUPS = ("clean", "spoilt", "mimics", "real")
MIMIC_SEED, MIMICS_EACH = 950_000, 8
BAD_DICE = 0.5
#: Scores in the tables, the combined one first.
COMBINED = "combined"
SHOWN = (
    COMBINED,
    "agreement",
    "histogram",
    "quality",
    "mimicry",
    "spectral",
    "rest",
    "spectral_lesion",
    "soft_dice",
    "probability",
    "weakest",
    "entropy",
)
RESAMPLES = 300


@dataclass(frozen=True)
class Row:
    """One judged case with its scores."""

    patient: str
    """Name of the patient, the same for clean and spoilt images."""
    group: str
    kind: str
    strength: int
    seen: SegmentedPatient
    scores: dict[str, float]
    verdict: Verdict | None
    expected: float | None
    interval: tuple[float, float] | None

    @property
    def empty(self) -> bool:
        """Whether the mask is empty."""
        return self.scores["volume_ml"] == 0

    @property
    def flagged(self) -> bool:
        """Whether the verdict asks the user to check the mask."""
        return self.verdict in ("check", "poor")


def remember_brains(folder: Path) -> None:
    """Cache HD-BET's brain masks in a folder, for this process and later ones: they take most of the time and depend on no member."""
    folder.mkdir(parents=True, exist_ok=True)
    strip = skull._brain_probability

    def remembered(dwi: Volume, device: str) -> BoolArray:
        digest = hashlib.sha256(np.ascontiguousarray(dwi.array).tobytes() + dwi.grid.describe().encode()).hexdigest()
        path = folder / f"{digest[:20]}.npz"
        if not path.exists():
            with draft_of(path) as draft:
                np.savez_compressed(draft, brain=strip(dwi, device))
        return np.asarray(np.load(path)["brain"], dtype=bool)

    skull._brain_probability = remembered


class UncheckedCollection(Collection):
    """Segments also patients whose images the input checks refuse, and records the reason."""

    def _segmented(self, patient: Patient) -> SegmentedPatient:
        return self.measured(patient.truth(self._shared, self._caches))

    def measured(self, truth: Truth) -> SegmentedPatient:
        """Segment a case, without the input checks if they refuse it."""
        try:
            return segmented_patient(truth, segment_raw(truth.raw, self._ensemble, SilentWatcher()))
        except InputRefused as refused:
            reason = f"{refused.what}: {refused.found}"
        unchecked = tuple(step for step in preparation.STEPS if not step.__name__.startswith("check_"))
        try:
            with patch.object(preparation, "STEPS", unchecked):
                seen = segmented_patient(truth, segment_raw(truth.raw, self._ensemble, SilentWatcher()))
        except InputRefused:
            seen = SegmentedPatient(truth.raw.name, None, *(float("nan"),) * 3)
        return SegmentedPatient(**vars(seen) | {"refused": reason})


def gathered(
    collection: UncheckedCollection, options: argparse.Namespace
) -> Iterator[tuple[str, str, str, int, SegmentedPatient]]:
    """Yield (group, patient, kind, strength, segmented patient) for all requested groups."""
    have = collection.get

    def of(patient: Patient) -> SegmentedPatient | None:
        return have(patient.name) if options.have else next(collection.of([patient]))

    if "clean" in options.only:
        for patient in validation_patients(options.patients):
            if seen := of(patient):
                yield "clean", patient.name, "", 0, seen
    if "spoilt" in options.only:
        for patient in spoilt_for_measurement(options.spoilt):
            if seen := of(patient):
                name = f"simulated_{patient.seed - VALIDATION_SEED:03d}"
                yield "spoilt", name, patient.kind, patient.strength, seen
    if "mimics" in options.only:
        for number in range(MIMICS_EACH):
            for turn, kind in enumerate(MIMICS):
                name, seed = f"mimic_{kind}_{number}", MIMIC_SEED + len(MIMICS) * number + turn
                seen = have(name)
                if seen is None and not options.have:
                    acquired = mimic(kind, seed, _mimic_head(number), options.shared)
                    truth = Truth(as_raw(name, acquired), np.zeros(acquired.lesion.shape, bool))
                    seen = collection.put(collection.measured(truth))
                if seen:
                    yield "mimics", name, kind, 0, seen
    if "real" in options.only:
        cases = [*real_cases(options.shared / "cases"), *lesion_free_heads(options.shared / "normals")]
        for truth in cases:
            seen = have(f"real_{truth.raw.name}")
            if seen is None and not options.have:
                found = collection.measured(truth)
                seen = collection.put(SegmentedPatient(**vars(found) | {"name": f"real_{truth.raw.name}"}))
            if seen:
                yield "real", truth.raw.name, "", 0, seen


def judged(ensemble: Ensemble, collection: UncheckedCollection, options: argparse.Namespace) -> list[Row]:
    """Return every segmented case with its scores."""
    data = CalibrationData.of(ensemble, collection, (REFERENCES, CALIBRATIONS, SPOILT))
    judges = {head: TrustModel(data.references, data.calibration(without=head)) for head in (None, *HELD_OUT_HEADS)}
    rows = []
    for group, patient, kind, strength, seen in gathered(collection, options):
        if seen.evidence is None:
            continue
        number = int(patient.split("_")[-1]) if group != "real" else 0
        judge = judges[
            None if group == "real" else _mimic_head(number) if group == "mimics" else head_of(VALIDATION_SEED + number)
        ]
        told = judge.verdict(compute_trust_scores(seen.evidence, judge.references), empty=seen.evidence.empty)
        scores = dict(told.scores)
        rows.append(Row(patient, group, kind, strength, seen, scores, told.verdict, told.expected_dice, told.interval))
    return rows


def _mimic_head(number: int) -> int:
    return HELD_OUT_HEADS[number % len(HELD_OUT_HEADS)]


def aurc(confidence: AnyArray, risk: AnyArray) -> float:
    """Area under the risk-coverage curve (Geifman and El-Yaniv, 2017): mean risk of the most confident n, over all n.

    Of equally confident cases each has the mean risk of all of them.
    """
    order = np.argsort(-confidence, kind="stable")
    _, place, counts = np.unique(-confidence[order], return_inverse=True, return_counts=True)
    tied = np.bincount(place, weights=risk[order])[place] / counts[place]
    return float((np.cumsum(tied) / np.arange(1, len(risk) + 1)).mean())


def excess_aurc(confidence: AnyArray, risk: AnyArray) -> float:
    """AURC beyond that of the best order."""
    return aurc(confidence, risk) - aurc(-risk, risk)


def auroc(value: AnyArray, positive: AnyArray) -> float:
    """Probability that a positive case has a higher value than a negative one (ties count half); nan without either."""
    one, other = value[positive], value[~positive]
    if not len(one) or not len(other):
        return float("nan")
    return auc(other, one)


def confidence(rows: Sequence[Row], name: str) -> AnyArray:
    """A score of each case, higher for more trust; the median where there is none, as of an empty mask's probability."""
    sign = 1 if name == COMBINED else DIRECTIONS[name]
    values = np.array([sign * row.scores.get(name, np.nan) for row in rows], float)
    return np.where(np.isnan(values), np.nanmedian(values), values)


def resampled(rows: Sequence[Row], measure: Callable[[AnyArray], float]) -> tuple[float, float]:
    """Bootstrap interval (95 %) of a measure of chosen rows (indices): patients are drawn, with all that was made of them."""
    draw = np.random.default_rng(0)
    patients: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        patients.setdefault(row.patient, []).append(at)
    groups = [np.array(group) for group in patients.values()]
    found = [
        measure(np.concatenate([groups[n] for n in draw.integers(0, len(groups), len(groups))]))
        for _ in range(RESAMPLES)
    ]
    low, high = np.nanquantile(found, (0.025, 0.975))
    return float(low), float(high)


def score_table(title: str, rows: Sequence[Row]) -> list[str]:
    """Each score on some cases: AURC (of Dice, of lesion F1), excess AURC, Spearman with Dice, AUROC of a bad Dice."""
    if len(rows) < 10:
        return []
    dice, f1 = (np.array([getattr(row.seen, name) for row in rows]) for name in ("dice", "lesion_f1"))
    bad = dice < BAD_DICE
    lines = [
        "",
        f"**{title}** (n = {len(rows)}, mean Dice {dice.mean():.2f}, Dice < {BAD_DICE} in {bad.sum()}; 95 % bootstrap intervals)",
        "",
        "| score | AURC, 1 - Dice | excess | AURC, 1 - F1 | Spearman with Dice | AUROC, Dice < 0.5 |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for name in SHOWN:
        if not any(name in row.scores for row in rows):
            continue
        sure = confidence(rows, name)
        area = resampled(rows, lambda at, c=sure: aurc(c[at], 1 - dice[at]))  # type: ignore[misc]
        told = resampled(rows, lambda at, c=sure: auroc(-c[at], bad[at]))  # type: ignore[misc]
        lines.append(
            f"| {name} | {aurc(sure, 1 - dice):.3f} ({area[0]:.3f} to {area[1]:.3f}) | {excess_aurc(sure, 1 - dice):.3f} "
            f"| {aurc(sure, 1 - f1):.3f} | {spearmanr(sure, dice).statistic:.2f} "
            f"| {auroc(-sure, bad):.3f} ({told[0]:.3f} to {told[1]:.3f}) |"
        )
    return lines


def images_table(rows: Sequence[Row]) -> list[str]:
    """Tabulate how well each score separates spoilt images (of the higher two strengths) from clean ones."""
    chosen = [row for row in rows if row.group == "clean" or row.strength > 0]
    spoilt = np.array([row.group == "spoilt" for row in chosen])
    if not spoilt.any() or spoilt.all():
        return []
    unseen = np.array([row.kind not in CALIBRATION_KINDS for row in chosen])
    counts = f"spoilt, the higher two strengths, n = {spoilt.sum()}, against clean, n = {(~spoilt).sum()}"
    lines = [
        "",
        f"**Not a stroke DWI as it should be** ({counts})",
        "",
        "| score | AUROC | kinds that calibration did not see |",
        "| --- | --- | ---: |",
    ]
    for name in SHOWN:
        if any(name in row.scores for row in chosen):
            sure = confidence(chosen, name)
            ends = resampled(chosen, lambda at, c=sure: auroc(-c[at], spoilt[at]))  # type: ignore[misc]
            fresh = ~spoilt | unseen
            lines.append(
                f"| {name} | {auroc(-sure, spoilt):.3f} ({ends[0]:.3f} to {ends[1]:.3f}) | {auroc(-sure[fresh], spoilt[fresh]):.3f} |"
            )
    return lines


def verdict_table(rows: Sequence[Row]) -> list[str]:
    """Tabulate the verdicts for each group and each kind of fault."""
    lines = [
        "",
        "| cases | n | refused by the checks | good | check | poor | mean Dice: good | check, poor | good and Dice < 0.5 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    kinds = [("clean", [row for row in rows if row.group == "clean"])]
    kinds += [
        (f"{kind}{'' if kind in CALIBRATION_KINDS else ' *'}, strength {strength + 1}", here)
        for kind in CORRUPTIONS
        for strength in STRENGTHS
        if (here := [row for row in rows if (row.group, row.kind, row.strength) == ("spoilt", kind, strength)])
    ]
    for what, here in kinds:
        if not here:
            continue
        good = [row.seen.dice for row in here if not row.flagged]
        flagged = [row.seen.dice for row in here if row.flagged]
        shares = " | ".join(f"{np.mean([row.verdict == v for row in here]):.0%}" for v in ("good", "check", "poor"))
        refused = np.mean([bool(row.seen.refused) for row in here])
        quiet = sum(dice < BAD_DICE for dice in good) / len(here)
        lines.append(
            f"| {what} | {len(here)} | {refused:.0%} | {shares} | {_mean(good)} | {_mean(flagged)} | {quiet:.0%} |"
        )
    return [*lines, "", "\\* calibration saw no such fault."]


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}" if values else "-"


def specificity_table(rows: Sequence[Row]) -> list[str]:
    """Tabulate how often a mask is found without an infarct, and how often it is not flagged."""
    groups = [("no lesion, simulated", [r for r in rows if r.group == "clean" and r.seen.truth_ml == 0])]
    groups += [(kind, [r for r in rows if r.group == "mimics" and r.kind == kind]) for kind in MIMICS]
    groups.append(("all mimics", [r for r in rows if r.group == "mimics"]))
    lines = [
        "",
        f"| no infarct | n | mask above {FALSE_ALARM_ML} ml | of these not flagged | flagged in all |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for what, here in groups:
        if here:
            false = [row for row in here if row.scores["volume_ml"] > FALSE_ALARM_ML]
            quiet = sum(not row.flagged for row in false)
            share = f"{len(false) / len(here):.0%} ({len(false)})"
            lines.append(
                f"| {what} | {len(here)} | {share} | {quiet / len(here):.0%} ({quiet}) | {np.mean([r.flagged for r in here]):.0%} |"
            )
    return lines


def interval_lines(rows: Sequence[Row]) -> list[str]:
    """Report how often the Dice is in its interval, and how often clean patients are flagged."""
    clean = [row for row in rows if row.group == "clean"]
    if not clean:
        return []
    told = [(row.seen.dice, row.expected, row.interval) for row in clean if row.interval and row.expected is not None]
    lines = [""]
    if told:
        inside = np.mean([low <= dice <= high for dice, _, (low, high) in told])
        error = np.mean([abs(dice - expected) for dice, expected, _ in told])
        lines.append(
            f"Clean patients with a mask: {inside:.0%} of {len(told)} have their Dice in the interval; mean error {error:.2f}."
        )
    flagged = sum(row.flagged for row in clean)
    lines.append(f"Clean patients flagged: {flagged} of {len(clean)} ({flagged / len(clean):.1%}).")
    return lines


def real_table(rows: Sequence[Row]) -> list[str]:
    """Tabulate the public cases one by one."""
    here = [row for row in rows if row.group == "real"]
    if not here:
        return []
    lines = [
        "",
        "| case | ml | Dice | expected | verdict | agreement | spectral | histogram |",
        "| --- | ---: | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for row in here:
        expected = (
            "-"
            if row.expected is None or row.interval is None
            else f"{row.expected:.2f} ({row.interval[0]:.2f} to {row.interval[1]:.2f})"
        )
        numbers = " | ".join(
            f"{row.scores.get(name, float('nan')):.2f}" for name in ("agreement", "spectral", "histogram")
        )
        lines.append(
            f"| {row.patient} | {row.scores['volume_ml']:.2f} | {row.seen.dice:.2f} | {expected} | {row.verdict} | {numbers} |"
        )
    return lines


def report(rows: Sequence[Row]) -> list[str]:
    """Return all tables as Markdown."""
    clean = [row for row in rows if row.group == "clean"]
    spoilt = [row for row in rows if row.group == "spoilt"]
    passed = [row for row in spoilt if not row.seen.refused]
    return [
        *score_table("Simulated patients as they are", clean),
        *score_table("Simulated patients as they are, with a mask", [row for row in clean if not row.empty]),
        *score_table("Spoilt images that the checks let pass", passed),
        *score_table(
            "Spoilt images that the checks refuse, measured all the same", [r for r in spoilt if r.seen.refused]
        ),
        *score_table("All that reaches the networks: as they are, and spoilt unnoticed", [*clean, *passed]),
        *images_table(rows),
        *verdict_table(rows),
        *interval_lines(rows),
        *specificity_table(rows),
        *real_table(rows),
    ]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write all scores as CSV, one row per case."""
    columns = [
        "patient",
        "group",
        "kind",
        "strength",
        "refused",
        "truth_ml",
        "dice",
        "lesion_f1",
        "verdict",
        "expected",
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, COMBINED, *DIRECTIONS])
        for row in rows:
            seen = row.seen
            told = [
                row.patient,
                row.group,
                row.kind,
                row.strength,
                seen.refused,
                seen.truth_ml,
                seen.dice,
                seen.lesion_f1,
            ]
            writer.writerow(
                [*told, row.verdict, row.expected, *(row.scores.get(name, "") for name in (COMBINED, *DIRECTIONS))]
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trust", description="Does the trust score tell wrong masks?"
    )
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(GROUPS), help="of: " + ",".join(GROUPS)
    )
    parser.add_argument("--patients", type=int, default=150, help="as they are (default: %(default)s)")
    parser.add_argument("--spoilt", type=int, default=20, help="spoilt in every way (default: %(default)s)")
    parser.add_argument("--have", action="store_true", help="segment nobody: print what is known already")
    parser.add_argument("--csv", type=Path, help="where to write every number")
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where patients are kept (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="another folder with simulated validation cases, to read from")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(GROUPS):
        parser.error(f"--only knows {', '.join(GROUPS)}, not {', '.join(sorted(unknown))}")
    keep_freed_memory()
    torch.set_num_threads(1)
    remember_brains(options.folder / "brains")
    ensemble = open_ensemble(options.weights)
    collection = UncheckedCollection(
        ensemble, options.folder, options.shared, (options.cache,) if options.cache else ()
    )
    rows = judged(ensemble, collection, options)
    if options.csv:
        write_csv(options.csv, rows)
    print("\n".join(report(rows)))


if __name__ == "__main__":
    main()
