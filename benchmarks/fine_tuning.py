"""What does fine-tuning the shipped members on a hospital's own cases gain? On simulated patients of a protocol that they never saw.

    python -m benchmarks.fine_tuning --work SCRATCH [--patients 40] [--minutes 10] [--folds 2] [--shared ../shared]

The hospital scans with b 1800 s/mm^2, TE 115 ms, and voxels of 6.5 x 1.2 x 1.2 mm; heads and lesion shapes are those kept out of the
training of the shipped members; every tenth patient has no lesion. They are written as ISLES'22 is published and go through the
commands of docs/training.md. Before: `batch` with the shipped members and `evaluate`. After: `training.fit all --start-from
model_weights`, measured out of fold. Neither is mirrored. Calling again goes on. It takes minutes x folds x 3 members, and a few more.
Needs ../shared.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

from ensemble import cli
from ensemble.outputs.formats import image
from ensemble.types import Modality
from ensemble.volume import Volume
from training import dataset, fit
from training.evaluate import as_raw
from training.signals import DiffusionProtocol
from training.simulate import SHARED, simulate

FIRST_SEED = 960_000
PROTOCOL = DiffusionProtocol(b_s_per_mm2=1800.0, te_ms=115.0, tr_ms=9500.0)
SPACING_MM = (6.5, 1.2, 1.2)  # (z, y, x)
MEASURES = ("dice", "lesion_f1", "avd_ml", "alcd")
MEMBERS = "model_weights"
_FILE_NAMES = {Modality.DWI: "dwi", Modality.ADC: "adc", Modality.FLAIR: "FLAIR"}


def write_patients(root: Path, count: int, shared: Path) -> None:
    """Write simulated patients in the layout of ISLES'22's release."""
    for number in range(count):
        subject = f"sub-strokecase{number:04d}"
        mask_path = root / "derivatives" / subject / "ses-0001" / f"{subject}_ses-0001_msk.nii.gz"
        if mask_path.exists():
            continue
        case = simulate(
            FIRST_SEED + number,
            shared,
            spacing_mm=SPACING_MM,
            lesion_free=number % 10 == 9,
            held_out=True,
            protocol=PROTOCOL,
        )
        volumes = {m: held.volume for m, held in as_raw(subject, case).images.items()}
        folder = root / "rawdata" / subject / "ses-0001"
        for made in (folder, mask_path.parent):
            made.mkdir(parents=True, exist_ok=True)
        for modality, volume in volumes.items():
            image.write(volume, folder / f"{subject}_ses-0001_{_FILE_NAMES[modality]}.nii.gz")
        mask = case.lesion.numpy().astype(np.uint8)
        image.write(Volume(mask, volumes[Modality.DWI].grid), mask_path)


def means(table: Path) -> dict[str, tuple[float, float, float]]:
    """Return mean and its interval of each measure over all cases."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["group"] == "all cases"]
    return {
        row["measure"]: (float(row["mean"]), float(row["mean_ci_low"]), float(row["mean_ci_high"]))
        for row in rows
        if row["measure"] in MEASURES
    }


def run(*arguments: str | Path) -> None:
    """Run a command of the product. Exits as it does where it fails."""
    if code := cli.main([str(argument) for argument in arguments]):
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--patients", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=10, help="of each network of each fold")
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=SHARED)
    options = parser.parse_args()
    work: Path = options.work
    data, bank, weights = work / "dataset", work / "bank", work / "weights"
    write_patients(data, options.patients, options.shared)
    if not (bank / "dataset.csv").exists() and dataset.main([str(data), "--out", str(bank), "--threads", "1"]):
        sys.exit("not every patient could be read")
    run("batch", data, work / "before", "--tta", "none", "--device", "cpu")
    run("evaluate", work / "before", data, "--out", work / "before.csv")
    told = [
        *("all", "--bank", bank, "--out", weights, "--start-from", MEMBERS, "--tta", "none"),
        *("--folds", options.folds, "--minutes", options.minutes, "--threads", options.threads),
        *("--licence", "Apache-2.0", "--consent", "simulated patients: the images are nobody's"),
    ]
    if not (weights / "manifest.json").exists() and (code := fit.main([str(part) for part in told])):
        sys.exit(code)
    before, after = means(work / "before_summary.csv"), means(weights / "out_of_fold_summary.csv")
    print(f"\n{options.patients} patients, {options.folds} folds, {options.minutes:g} minutes a network\n")
    print("| | before | after, out of fold |\n| --- | --- | --- |")
    for measure in MEASURES:
        told_by = [f"{mean:.3f} ({low:.3f}-{high:.3f})" for mean, low, high in (before[measure], after[measure])]
        print(f"| {measure} | {told_by[0]} | {told_by[1]} |")


if __name__ == "__main__":
    main()
