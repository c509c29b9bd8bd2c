"""Which small lesions should the fused mask keep that the members dispute? The tables of docs/adr/0015.

    python -m benchmarks.disputed [--patients 60:119] [--cache DIR] [--have]

Segments simulated validation patients with the shipped members, without mirroring and before any lesion is left out, and keeps the members'
probabilities as float16 in `.train/trust`: an interrupted call goes on, and `--have` segments nobody. Prints two tables as Markdown. The
first has the components that the fused mask has before the rule, true ones (which overlap a true lesion) and false ones, and their
peaks: the highest mean probability of the voters. The second has what each choice of the rule leaves: means over patients with a lesion
(recall and precision of voxels), how many true lesions below 0.3 ml that are visible on DWI are found in some voxel, and how many patients
without a lesion get more than 0.3 ml. Nothing here was measured on real cases, or with mirroring.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.fusion import PEAK, TINY_ML, TINY_PEAK, drop_disputed_components, fuse
from ensemble.memory import keep_freed_memory
from ensemble.metrics import detected_lesions, lesion_components
from ensemble.pipeline import Ensemble, load_from_config, segment_raw
from ensemble.progress import SilentWatcher
from ensemble.types import AnyArray, BoolArray, FloatArray, Modality
from ensemble.volume import Volume
from training.bank import anterior_grid
from training.calibrate import MAX_FALSE_ML, Patient, worth_of_masks
from training.drafts import draft_of
from training.evaluate import VISIBLE
from training.simulate import SHARED
from training.trust import FOLDER
from training.trust_patients import VALIDATION_SEED, weights_digest
from training.trust_patients import Patient as Simulated

SMALL_ML = 0.3
#: Bounds of the sizes of components (ml), and the shares of components that have a lower peak than the table says.
SIZES_ML, SHARES = (0.0, TINY_ML, SMALL_ML, 2.0, np.inf), (0.05, 0.25, 0.5)
PEAKS, LIMITS_ML = (0.6, 0.7, 0.8, 0.9), (0.0, 0.1, 1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Choice:
    """One choice of the rule: below `max_ml`, a component needs a voxel with this mean probability."""

    max_ml: float
    tiny_peak: float = TINY_PEAK
    """Of components below `TINY_ML`."""
    peak: float = PEAK
    unanimous: bool = False
    """All members must agree in some voxel instead (the rule until 2026-11-27)."""


@dataclass(frozen=True)
class Fused:
    """A patient's lesions, and what the members make of them before the rule; arrays are (z, y, x)."""

    lesion: BoolArray
    small: BoolArray
    """The lesions that are below `SMALL_ML` and visible."""
    mask: BoolArray
    mean: FloatArray
    """The voters' mean probability."""
    agreed: BoolArray
    """Where all members vote for lesion."""
    voxel_ml: float

    def after(self, choice: Choice) -> BoolArray:
        """Return the mask that a choice of the rule leaves."""
        sure = self.agreed.astype(np.float32) if choice.unanimous else self.mean
        tiny, peak = choice.tiny_peak, choice.peak
        return drop_disputed_components(self.mask, sure, self.voxel_ml, choice.max_ml, tiny_peak=tiny, peak=peak)[0]


def fused(patient: Patient, small: BoolArray, config: RunConfig) -> Fused:
    """Fuse the members' probabilities as a run with these settings does, up to the rule."""
    grid = anterior_grid(patient.lesion.shape, (1000 * patient.voxel_ml, 1.0, 1.0))  # only a voxel's volume counts
    said = {name: Volume(values.astype(np.float32), grid) for name, values in patient.probabilities.items()}
    result = fuse(said, config.fusion, weights=config.member_weights, min_lesion_ml=config.min_lesion_ml or 0.0)
    agreed = result.votes.array == len(said)
    return Fused(patient.lesion, small, result.mask.array, result.mean.array, agreed, patient.voxel_ml)


def small_and_visible(lesion: BoolArray, dwi: FloatArray, voxel_ml: float) -> BoolArray:
    """Return the lesions below `SMALL_ML` whose brightest tenth is above `VISIBLE` on the tissue-normalised DWI (z, y, x)."""
    labels, count = lesion_components(lesion)
    voxels = np.bincount(labels.ravel(), minlength=count + 1)
    small = [number for number in range(1, count + 1) if voxels[number] * voxel_ml < SMALL_ML]
    return np.isin(labels, [number for number in small if np.percentile(dwi[labels == number], 90) > VISIBLE])


def segmented(number: int, ensemble: Ensemble, shared: Path, caches: Sequence[Path]) -> dict[str, AnyArray]:
    """Segment a validation patient: true lesions, small ones, the members' probabilities, all cut to where these are; ml of a voxel."""
    truth = Simulated(f"simulated_{number:03d}", VALIDATION_SEED + number).truth(shared, caches)
    result = segment_raw(truth.raw, ensemble, SilentWatcher())
    said = {o.member: o.prediction.probability.array for o in result.outcomes if o.prediction is not None}
    if truth.mask is None or len(said) < len(ensemble.members):
        raise RuntimeError(f"{truth.raw.name}: only {', '.join(said)} voted")
    voxel_ml, dwi = result.case.grid.voxel_ml, result.case.tissue_normalized[Modality.DWI].array
    cut = Patient(truth.mask, {name: p.astype(np.float16) for name, p in said.items()}, voxel_ml).cut()
    small = small_and_visible(truth.mask, dwi, voxel_ml)[cut.box]
    return {"lesion": cut.lesion, "small": small, "voxel_ml": np.array(voxel_ml)} | {
        f"member_{name}": probability for name, probability in cut.probabilities.items()
    }


def gathered(ensemble: Ensemble, options: argparse.Namespace) -> list[Fused]:
    """Return the patients, segmented now unless they are kept; with `--have` only those that are."""
    folder = options.folder / f"probabilities_{weights_digest(ensemble)}"
    folder.mkdir(parents=True, exist_ok=True)
    caches = (options.folder / "cases", *([options.cache] if options.cache else []))
    patients = []
    for number in tqdm(options.patients, disable=None):
        path = folder / f"simulated_{number:03d}.npz"
        if not path.exists():
            if options.have:
                continue
            with draft_of(path) as draft:
                np.savez_compressed(draft, **segmented(number, ensemble, options.shared, caches))  # type: ignore[arg-type]
        with np.load(path) as kept:
            said = {name.removeprefix("member_"): kept[name] for name in kept if name.startswith("member_")}
            patient = Patient(kept["lesion"], said, float(kept["voxel_ml"]))
            patients.append(fused(patient, kept["small"], ensemble.config))
    return patients


def component_table(patients: Sequence[Fused]) -> list[str]:
    """Tabulate the peaks of true and of false components by size."""
    rows: list[tuple[bool, float, float]] = []
    for patient in patients:
        labels, count = lesion_components(patient.mask)
        voxels, true = detected_lesions(patient.mask, patient.lesion)
        peaks = ndimage.maximum(patient.mean, labels, range(1, count + 1))
        rows += zip(true, voxels * patient.voxel_ml, peaks, strict=True)
    lines = ["| components | number | peak: lowest twentieth, lowest quarter, half |", "| --- | ---: | --- |"]
    for kind in (True, False):
        for low, high in zip(SIZES_ML, SIZES_ML[1:], strict=False):
            peaks = [peak for true, ml, peak in rows if true == kind and low <= ml < high]
            size = f"above {low:g} ml" if high == np.inf else f"{low:g}-{high:g} ml" if low else f"below {high:g} ml"
            told = ", ".join(f"{peak:.2f}" for peak in np.quantile(peaks, SHARES)) if peaks else "-"
            lines.append(f"| {'true' if kind else 'false'}, {size} | {len(peaks)} | {told} |")
    return lines


def choices(max_ml: float) -> dict[Choice, str]:
    """Return the choices and what each removes: the product's peaks with other limits, and its limit `max_ml` with other peaks."""
    tiny = f"below {TINY_ML:g} ml"
    said = {Choice(0.0): "nothing", Choice(0.1, unanimous=True): f"{tiny}, all members agree in no voxel"}
    peaks = [(low, high) for low in PEAKS for high in PEAKS if low <= high]
    for one in [*map(Choice, LIMITS_ML[1:]), *(Choice(max_ml, *both) for both in peaks)]:
        said[one] = f"below {one.max_ml:g} ml, peak below {one.peak:g} ({one.tiny_peak:g} {tiny})"
    extremes = {Choice(max_ml, 0.0): f"none {tiny}", Choice(max_ml, np.inf): f"all {tiny}"}
    return said | {one: f"below {max_ml:g} ml, peak below {PEAK:g} ({what})" for one, what in extremes.items()}


def rule_table(patients: Sequence[Fused], max_ml: float) -> list[str]:
    """Tabulate what each choice of the rule leaves, that of the product (`max_ml`, `TINY_PEAK`, `PEAK`) in bold."""
    free = sum(not patient.lesion.any() for patient in patients)
    heads = f"Dice | lesion F1 | recall | precision | small visible lesions found | lesion-free above {MAX_FALSE_ML} ml"
    lines = [f"| removed lesions | {heads} |", "| --- " + "| ---: " * 6 + "|"]
    for choice, what in choices(max_ml).items():
        masks = [(patient, patient.after(choice)) for patient in patients]
        worth = worth_of_masks((patient.lesion, mask, patient.voxel_ml) for patient, mask in masks)
        found = np.concatenate([detected_lesions(patient.small, mask)[1] for patient, mask in masks])
        lines.append(
            f"| {f'**{what}**' if choice == Choice(max_ml) else what} | {worth.dice:.3f} | {worth.f1:.3f} "
            f"| {worth.recall:.3f} | {worth.precision:.3f} | {found.sum()} of {len(found)} "
            f"| {worth.false_share * free:.0f} of {free} |"
        )
    return lines


def _range(text: str) -> range:
    first, last = map(int, text.split(":"))
    return range(first, last + 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.disputed", description="Which disputed lesions should the fused mask keep?"
    )
    parser.add_argument("--patients", type=_range, default="60:119", metavar="FIRST:LAST", help="(default: 60:119)")
    parser.add_argument("--have", action="store_true", help="segment nobody: print what is known already")
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where patients are kept (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="another folder with simulated validation cases, to read from")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(1)
    ensemble = load_from_config(RunConfig(weights=options.weights, device="cpu", tta="none", trust=False))
    patients = gathered(ensemble, options)
    if not patients:
        parser.error("there is no such patient (with --have, none that is kept)")
    lesions_ml = [patient.lesion.sum() * patient.voxel_ml for patient in patients if patient.lesion.any()]
    found = f"{len(patients)}, {len(lesions_ml)} of them with a lesion"
    mean_ml = f" (mean {np.mean(lesions_ml):.2f} ml)" if lesions_ml else ""
    title = f"Patients {options.patients[0]} to {options.patients[-1]}: {found}{mean_ml}"
    rules = rule_table(patients, ensemble.config.min_disputed_ml or 0.0)
    print("\n".join([title, "", *component_table(patients), "", *rules]))


if __name__ == "__main__":
    main()
