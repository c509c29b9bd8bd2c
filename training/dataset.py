"""A data set with lesion masks to a bank for training: `python -m training.dataset DATASET --out BANK [--nnunet-raw DIR]`.

DATASET is ISLES'22's release as it is, any BIDS tree, a folder with `<case>/{dwi,adc,flair}.*`, or a .csv worklist with the columns case,
dwi, adc, flair, mask (and patient). Cases are found, read, checked, registered and normalised by the product itself. Whatever the
product would refuse is refused here, too, and `BANK/dataset.csv` says why.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ensemble.batch.find import find_cases
from ensemble.batch.layouts import FoundCase
from ensemble.batch.worklist import read_worklist, resolve_cell
from ensemble.config import RunConfig
from ensemble.errors import InputRefused, UsageError, UserError
from ensemble.evaluate.pairs import find_true_masks
from ensemble.evaluate.scores import read_mask
from ensemble.files import read_json
from ensemble.geometry import ROUNDING_VOXELS, Grid
from ensemble.memory import keep_freed_memory
from ensemble.metrics import lesion_count, volume_ml
from ensemble.prepare.case import PreparedCase, prepare_for_run
from ensemble.readers.imagefile import read_case_files
from ensemble.readers.names import stem
from ensemble.resample import resample_volume
from ensemble.text import escape_to_one_line, spreadsheet_cell
from ensemble.types import BoolArray, Modality
from ensemble.volume import Volume
from training import bank
from training.command import call
from training.dataset_plots import draw_plots
from training.nnunet_raw import NnunetRaw

log = logging.getLogger(f"ensemble.{__name__}")  # formatted as the product's messages

TABLE, PLOTS = "dataset.csv", "dataset.png"
USED, REFUSED = "used", "refused"
#: Largest share of the lesion mask outside the brain.
MAX_OUTSIDE = 0.5
#: What sidecars (BIDS) say of the scanner.
SIDECAR = {"manufacturer": "Manufacturer", "model": "ManufacturersModelName", "tesla": "MagneticFieldStrength"}


@dataclass(frozen=True)
class Labelled:
    """A case of the data set before anything of it is read."""

    found: FoundCase
    patient: str
    mask: Path | None = None
    problem: InputRefused | None = None
    """Why it can't be used, if already known."""


@dataclass(frozen=True)
class Row:
    """One case, for the table."""

    case: str
    patient: str
    status: str
    reason: str = ""
    """Why it is refused; of a case that is used, what was repaired."""
    file: str = ""
    lesion_ml: float | None = None
    lesions: int | None = None
    spacing_mm: str = ""
    """x, y, z of the DWI."""
    size: str = ""
    flair: bool | None = None
    scanner: Mapping[str, str] = field(default_factory=dict)


def patient_of(case: str) -> str:
    """Whose scan a case is: its BIDS subject's, else its own patient's. Equal subjects of two sites count as one, which can't leak."""
    subjects = [part for part in re.split(r"[/_]", case) if part.startswith("sub-")]
    return subjects[0] if subjects else case


def labelled(dataset: Path, out: Path, masks: Path | None = None) -> list[Labelled]:
    """Return the cases of a data set with their masks. Raises InputRefused if there are none."""
    if dataset.is_file():
        return [_of_worklist(found, dataset) for found in read_worklist(dataset, ("mask", "patient"))]
    cases = find_cases(dataset, out)
    dwis = {case.name: case.files[Modality.DWI] for case in cases if Modality.DWI in case.files}
    images = [path for case in cases for path in case.files.values()]
    pairs = find_true_masks(dwis, dataset, masks or dataset, images)
    used = [mask for pair in pairs.values() for mask in pair.truth]
    rows = []
    for case in cases:
        if not case.files and case.problem and any(mask.is_relative_to(case.problem.where) for mask in used):
            continue  # the folder of the masks
        pair, problem = pairs.get(case.name), case.problem
        if pair is not None and (len(pair.truth) > 1 or len(pair.predictions) > 1):
            problem = problem or InputRefused(
                "it is not clear which mask belongs to the case",
                where=dwis[case.name],
                found=f"masks {', '.join(map(str, pair.truth))}; cases {', '.join(map(str, pair.predictions))}",
                do="leave one mask a case, or name them in a .csv worklist with the columns case, dwi, adc, flair, mask",
            )
        rows.append(Labelled(case, patient_of(case.name), pair.truth[0] if pair else None, problem))
    return rows


def _of_worklist(found: FoundCase, worklist: Path) -> Labelled:
    mask = resolve_cell(worklist.parent, found.extra["mask"]) if "mask" in found.extra else None
    return Labelled(found, found.extra.get("patient") or patient_of(found.name), mask, found.problem)


@dataclass(frozen=True)
class Read:
    """A case that can be trained on."""

    case: PreparedCase
    lesion: BoolArray
    """(z, y, x) on the DWI grid."""
    notes: tuple[str, ...]


def read(one: Labelled, device: str = "cpu") -> Read:
    """Read and check a case and its mask. Raises InputRefused."""
    if one.problem is not None:
        raise one.problem
    if one.mask is None:
        raise InputRefused(
            "there is no mask of the lesion",
            where=one.found.files[Modality.DWI],
            do="name it by the case (sub-01_msk.nii.gz, <case>/mask.nii.gz), give its folder with --masks, or list it in a worklist;"
            " a patient without lesion has a mask of zeros",
        )
    raw = read_case_files(one.found.name, one.found.files)
    lesion = _on(raw.images[Modality.DWI].volume.grid, read_mask(one.mask, "true mask"), one.mask)
    case = prepare_for_run(raw, RunConfig(), device)
    outside = float((lesion & ~case.brain.array).sum() / max(1, lesion.sum()))
    if outside > MAX_OUTSIDE:
        raise InputRefused(
            "most of the mask lies outside the brain",
            where=one.mask,
            found=f"{outside:.0%} of it",
            do="check that it is the mask of this case",
        )
    notes = (*case.repairs, *([f"{outside:.1%} of the lesion lies outside the brain"] if outside > 0.01 else []))
    return Read(case, lesion, notes)


def _on(grid: Grid, mask: Volume, path: Path) -> BoolArray:
    """A mask on the DWI's grid, reordered if its axes are others. Raises InputRefused where it would have to be interpolated, or cut."""
    if (apart := grid.distance_voxels(mask.grid)) <= ROUNDING_VOXELS:
        return mask.array
    reordered = resample_volume(mask.like(mask.array.astype(np.float32)), grid, linear=False).array > 0.5
    if not mask.grid.same_lattice(grid, ROUNDING_VOXELS) or reordered.sum() != mask.array.sum():
        raise InputRefused(
            "the mask does not lie on the DWI grid",
            where=path,
            found=f"mask {mask.grid.describe()}; DWI {grid.describe()}; {apart:.3g} voxels apart",
            do="resample the mask to the DWI (nearest neighbour), or give the DWI that it was drawn on",
        )
    return reordered


def file_name(case: str) -> str:
    """A name for files that only this case has."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", case)
    return plain if plain == case.replace("/", "_") else f"{plain}-{hashlib.sha256(case.encode()).hexdigest()[:8]}"


def make_bank(cases: Sequence[Labelled], out: Path, raw: NnunetRaw | None = None, device: str = "cpu") -> list[Row]:
    """Write every case that can be used to the bank (and to nnU-Net's folder); a row each."""
    rows: list[Row] = []
    seen: dict[str, Labelled] = {}
    names: Counter[str] = Counter()
    for one in tqdm(cases, disable=None):
        name = file_name(one.found.name)
        names[name] += 1
        name += f"-{names[name]}" * (names[name] > 1)
        try:
            got = read(one, device)
            stack, spacing = bank.canonical(got.case)
            label = bank.anterior(got.case.grid.canonical().apply(got.lesion))
            digest = bank.digest_of(stack.astype(np.float16))
            if (twin := seen.get(digest)) is not None and twin.patient != one.patient:
                raise InputRefused(
                    "the same image stands for another patient, too",
                    where=one.found.files[Modality.DWI],
                    found=f"the DWI of {twin.found.name}",
                    do="leave one of them out, or give both the same patient in a worklist (column patient)",
                )
            seen.setdefault(digest, one)
            path = bank.write(out / f"case_{name}.npz", stack, label, spacing, patient=one.patient, real=True)
            if raw is not None:
                raw.add(name, got.case, got.lesion)
        except Exception as error:  # a case that no one has foreseen must not end hours of reading: it is listed, too
            foreseen = isinstance(error, UserError)
            reason = str(error) if foreseen else f"{type(error).__name__}: {error}"
            log.error("%s is refused: %s", one.found.name, error, exc_info=not foreseen)
            rows.append(Row(one.found.name, one.patient, REFUSED, escape_to_one_line(" ".join(reason.split()))))
            continue
        grid = got.case.grid
        rows.append(
            Row(
                one.found.name,
                one.patient,
                USED,
                "; ".join(got.notes),
                path.name,
                volume_ml(got.lesion, grid.spacing_zyx_mm),
                lesion_count(got.lesion),
                " x ".join(f"{mm:.3g}" for mm in grid.spacing_mm),
                " x ".join(map(str, grid.size)),
                Modality.FLAIR in got.case.modalities,
                scanner(one.found.files[Modality.DWI]),
            )
        )
    return rows


def scanner(dwi: Path) -> dict[str, str]:
    """Return the scanner from the DWI's sidecar."""
    try:
        said = read_json(dwi.with_name(stem(dwi) + ".json"))
        return {ours: str(said[theirs]) for ours, theirs in SIDECAR.items() if theirs in said}
    except (OSError, ValueError, TypeError):
        return {}


def write_table(rows: Sequence[Row], path: Path) -> None:
    """A row a case."""
    columns = [name for name in Row.__dataclass_fields__ if name != "scanner"] + list(SIDECAR)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            cells = asdict(row) | dict(row.scanner)
            writer.writerow({key: _cell(value) for key, value in cells.items() if key in columns})


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return (
        f"{value:.6g}"
        if isinstance(value, float)
        else int(value)
        if isinstance(value, bool)
        else spreadsheet_cell(value)
    )


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """The data set in a few lines."""
    used = [row for row in rows if row.status == USED]
    volumes = np.array([row.lesion_ml for row in used], float)
    counts = np.array([row.lesions for row in used], float)
    yield f"{len(used)} of {len(rows)} cases used, of {len({row.patient for row in used})} patients"
    yield f"without lesion: {int((volumes == 0).sum())}; with FLAIR: {sum(bool(row.flair) for row in used)}"
    for what, values in (("lesion ml", volumes), ("lesions", counts)):
        quartiles = ", ".join(f"{value:.3g}" for value in np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))
        yield f"{what}, quartiles: {quartiles}"
    for what, often in (
        ("voxels (mm)", Counter(row.spacing_mm for row in used)),
        ("scanners", Counter(" ".join(row.scanner.values()) or "not said" for row in used)),
    ):
        yield f"{what}: " + ", ".join(f"{number} of {kind}" for kind, number in often.most_common(8))


def convert(dataset: Path, out: Path, masks: Path | None, raw: Path | None, device: str) -> int:
    """Make the bank. Returns how many cases are refused. Raises InputRefused where nothing can be trained on."""
    if out.is_dir() and any(out.glob("case_*.npz")):
        raise UsageError("the bank is not empty", where=out, do="name a new folder as --out, or delete this one")
    out.mkdir(parents=True, exist_ok=True)
    nnunet = NnunetRaw(raw) if raw is not None else None
    cases = labelled(dataset, out, masks)
    rows = make_bank(cases, out, nnunet, device)
    write_table(rows, out / TABLE)
    used = [row for row in rows if row.status == USED]
    if not used:
        first = rows[0].reason
        raise InputRefused(
            "no case can be trained on", where=dataset, found=first, do=f"{out / TABLE} says why of each"
        )
    if not any(row.lesion_ml for row in used):
        raise InputRefused(
            "no mask holds a lesion",
            where=masks or dataset,
            found=f"{len(used)} masks of zeros",
            do="check that these are the true masks: at least some patients need a lesion",
        )
    draw_plots([row for row in used if row.lesion_ml is not None], out / PLOTS)
    if nnunet is not None:
        nnunet.finish()
    for line in summary(rows):
        log.info("%s", line)
    log.info("written: %s, %s", out / TABLE, out / PLOTS)
    return len(rows) - len(used)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code 3 when a case is refused; the others are in the bank.",
    )
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder, or .csv worklist")
    parser.add_argument("--out", type=Path, required=True, help="the bank: a new folder")
    parser.add_argument("--masks", type=Path, help="folder of the true masks, where they don't lie below DATASET")
    parser.add_argument(
        "--nnunet-raw", type=Path, metavar="DIR", help="also write nnU-Net's raw data: <nnUNet_raw>/Dataset123_Name"
    )
    parser.add_argument("--device", default="cpu", help="where HD-BET runs for heads with skull (cpu, cuda)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(options.threads)

    def command() -> int:
        refused = convert(options.dataset, options.out, options.masks, options.nnunet_raw, options.device)
        return InputRefused.exit_code if refused else 0

    return call(command)


if __name__ == "__main__":
    sys.exit(main())
