"""A hospital's batch, killed at random moments: does every case come out as if nothing had happened?

    python -m benchmarks.hospital_batch --work SCRATCH [--cases 300] [--kills 10] [--patients 0] [--seed 0]

Makes a dataset of small cases in all layouts that `batch` finds, 5 % of them broken in different ways; runs `process.py batch` on it once
undisturbed; then on a second output folder, killed with SIGKILL at random moments and started again; then two processes at once on a
third. Exit code 0 when all three trees are the same to the byte, timings and dates apart, each good case is done, each bad one
explained, and no case was done twice. Networks are small ones with random weights: the masks mean nothing here, their bytes do.

Cases are coarse variations of the simulated sample case (other noise, gain and place); `--patients N` draws N patients from the simulator
instead (needs ../shared; some seconds each).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.types import Modality

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "test"))
_SAMPLE = REPOSITORY / "test" / "sample" / "input" / "images"
_COARSE_MM = (5.0, 5.0, 6.0)
_LAYOUTS = ("bids", "contract", "flat")
Images = dict[Modality, sitk.Image]


def main() -> None:
    options = _options()
    scratch: Path = options.work
    data, weights = scratch / "data", scratch / "weights"
    if not data.exists():
        _make_weights(weights)
        bad = _make_dataset(data, options.cases, options.patients, options.seed)
        (scratch / "bad.json").write_text(json.dumps(bad))
    bad = json.loads((scratch / "bad.json").read_text())
    print(f"{options.cases} cases, {len(bad)} of them broken", flush=True)
    for name in ("whole", "killed", "shared"):
        shutil.rmtree(scratch / name, ignore_errors=True)
    started = time.monotonic()
    _run(data, scratch / "whole", weights, scratch).wait()
    whole_s = time.monotonic() - started
    print(f"undisturbed: {whole_s:.0f} s", flush=True)
    kills = _run_with_kills(data, scratch / "killed", weights, scratch, options.kills, whole_s, options.seed)
    both = [_run(data, scratch / "shared", weights, scratch, f"share{number}") for number in (1, 2)]
    codes = [process.wait() for process in both]
    print(f"two at once: exit codes {codes}")
    faults = [*_faults(scratch / "whole", options.cases, bad), *_twice(scratch, options.cases - len(bad))]
    faults += _differences(scratch / "whole", scratch / "killed") + _differences(scratch / "whole", scratch / "shared")
    if kills < options.kills:
        faults.append(f"only {kills} of {options.kills} kills met a running batch")
    for fault in faults:
        print("FAULT:", fault)
    print(f"{kills} kills; {len(faults)} faults")
    raise SystemExit(1 if faults else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="a hospital's batch, killed at random moments")
    parser.add_argument(
        "--work", type=Path, required=True, help="scratch folder outside the repository; its dataset is used again"
    )
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument(
        "--patients", type=int, default=0, help="patients drawn from the simulator; 0: vary the sample case"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _make_weights(root: Path) -> None:
    from nnunet_folders import FolderSpec, build_folder

    for number, name in enumerate(("first", "second")):
        build_folder(root / name, FolderSpec(patch=(16, 24, 24), spacing_mm=(6.0, 5.0, 5.0), features=4), seed=number)


def _make_dataset(data: Path, cases: int, patients: int, seed: int) -> list[str]:
    """Write the cases; returns the names of the broken ones."""
    rng = np.random.default_rng(seed)
    bases = list(_simulated(patients)) if patients else [_sample()]
    broken: list[str] = []
    unfit = set(rng.choice(cases, max(1, cases // 20), replace=False).tolist())
    for number in range(cases):
        images = _varied(bases[number % len(bases)], rng)
        name, files = _places(_LAYOUTS[number % 3], number)
        for modality, image in images.items():
            path = data / files[modality]
            path.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image, str(path), useCompression=True)
        if number in unfit:
            _break(len(broken) % 6, {modality: data / file for modality, file in files.items()}, images)
            broken.append(name)
    return broken


def _sample() -> Images:
    files = {modality: next((_SAMPLE / f"{modality}-brain-mri").glob("*.mha")) for modality in Modality}
    return {modality: _coarse(sitk.ReadImage(str(file), sitk.sitkFloat32)) for modality, file in files.items()}


def _simulated(count: int) -> Iterator[Images]:
    from ensemble.volume import to_sitk
    from training.evaluate import as_raw
    from training.simulate import simulate

    for seed in range(count):
        raw = as_raw(str(seed), simulate(700_000 + seed))
        yield {modality: _coarse(to_sitk(image.volume)) for modality, image in raw.images.items()}


def _coarse(image: sitk.Image) -> sitk.Image:
    """On larger voxels; 0 outside the brain stays 0."""
    size = [
        max(8, round(n * mm / to)) for n, mm, to in zip(image.GetSize(), image.GetSpacing(), _COARSE_MM, strict=True)
    ]
    grid = (size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), _COARSE_MM, image.GetDirection())
    inside = sitk.Cast(sitk.Resample(sitk.Cast(image > 0, sitk.sitkFloat32), *grid) > 0.5, sitk.sitkFloat32)
    return sitk.Resample(sitk.SmoothingRecursiveGaussian(image, 2.0), *grid) * inside


def _varied(images: Images, rng: np.random.Generator) -> Images:
    """Other gain, noise and place; a third of the cases has no FLAIR."""
    shift = [float(mm) for mm in rng.normal(0, 20, 3)]
    varied: Images = {}
    for modality, image in images.items():
        if modality is Modality.FLAIR and rng.random() < 1 / 3:
            continue
        array = sitk.GetArrayFromImage(image)
        gain = 1.0 if modality is Modality.ADC else rng.uniform(0.5, 2.0)
        noisy = np.where(array > 0, np.maximum(array * gain * (1 + rng.normal(0, 0.03, array.shape)), 1e-3), 0)
        varied[modality] = sitk.GetImageFromArray(noisy.astype(np.float32))
        varied[modality].CopyInformation(image)
        varied[modality].SetOrigin([at + mm for at, mm in zip(image.GetOrigin(), shift, strict=True)])
    return varied


def _places(layout: str, number: int) -> tuple[str, dict[Modality, str]]:
    """The name that the case will have, and its files."""
    if layout == "bids":
        base, stem = f"sub-{number:04d}/ses-1", f"sub-{number:04d}_ses-1"
        files = {Modality.DWI: f"dwi/{stem}_dwi", Modality.ADC: f"dwi/{stem}_adc", Modality.FLAIR: f"anat/{stem}_FLAIR"}
        return base, {modality: f"{base}/{file}.nii.gz" for modality, file in files.items()}
    if layout == "contract":
        name = f"upload {number:04d}"
        return name, {
            modality: f"{name}/images/{modality}-brain-mri/{number:04x}-{modality}.mha" for modality in Modality
        }
    name = f"ward/patient_{number:04d}"
    return name, {modality: f"{name}/{modality}.nii.gz" for modality in Modality}


def _break(way: int, files: dict[Modality, Path], images: Images) -> None:
    dwi, adc = files[Modality.DWI], files[Modality.ADC]
    match way:
        case 0:
            dwi.write_bytes(dwi.read_bytes()[: dwi.stat().st_size // 2])
        case 1:
            adc.unlink()
        case 2:
            sitk.WriteImage(images[Modality.ADC] * 0, str(adc))
        case 3:
            elsewhere = sitk.Image(images[Modality.DWI])
            elsewhere.SetOrigin([at + 1000 for at in elsewhere.GetOrigin()])
            sitk.WriteImage(elsewhere, str(dwi))
        case 4:
            sitk.WriteImage(images[Modality.DWI] * float("nan"), str(dwi))
        case _:
            shutil.copy(dwi, adc)


def _run(data: Path, out: Path, weights: Path, scratch: Path, log: str = "run") -> subprocess.Popen[bytes]:
    command = [sys.executable, str(REPOSITORY / "process.py"), "batch", str(data), str(out), "--weights", str(weights)]
    with (scratch / f"{log}.log").open("w") as file:
        return subprocess.Popen([*command, "--device", "cpu", "--tta", "none", "--report"], stdout=file, stderr=file)


def _run_with_kills(data: Path, out: Path, weights: Path, scratch: Path, kills: int, whole_s: float, seed: int) -> int:
    """Start again and again; returns how many kills met a running batch. The last run is left to end."""
    rng, met = random.Random(seed), 0
    for number in range(kills):
        process = _run(data, out, weights, scratch, "killed")
        while " cases in " not in (scratch / "killed.log").read_text() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.8 * whole_s / kills))
        met += process.poll() is None
        process.kill()
        process.wait()
        print(f"kill {number + 1}: {len(list(out.rglob('report.json')))} cases done", flush=True)
    code = _run(data, out, weights, scratch, "killed").wait()
    print(f"last run after the kills: exit code {code}", flush=True)
    return met


def _faults(out: Path, cases: int, bad: list[str]) -> list[str]:
    with (out / "summary.csv").open(newline="") as file:
        table = {row["case"]: row for row in csv.DictReader(file)}
    faults = [] if len(table) == cases else [f"{len(table)} rows for {cases} cases"]
    faults += [
        f"{name} is {row['status']}: {row['message']}"
        for name, row in table.items()
        if (row["status"] == "failed") != (name in bad)
    ]
    faults += [f"{name} failed without a reason" for name in bad if not table.get(name, {}).get("message")]
    return faults


def _twice(scratch: Path, good: int) -> list[str]:
    """Of two processes that share the work, each tells which cases it did itself."""
    lines = [line for number in (1, 2) for line in (scratch / f"share{number}.log").read_text().splitlines()]
    did = [line.split("] ")[1] for line in lines if line.startswith("[") and line.endswith(": done")]
    print(f"shared: {len(did)} cases done by two processes")
    return [] if len(did) == len(set(did)) == good else [f"{len(did)} results by two processes for {good} good cases"]


def _differences(one: Path, other: Path) -> list[str]:
    from batch_runs import comparable

    left, right = comparable(one), comparable(other)
    return [
        f"{other.name}/{name} differs" for name in sorted(set(left) | set(right)) if left.get(name) != right.get(name)
    ]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
