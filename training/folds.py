"""Which scans each network is trained on, and which it is tested on: folds by patient, stratified by lesion volume."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from ensemble.errors import InputRefused, UsageError
from training.bank import Scan

Folds = tuple[tuple[Scan, ...], ...]
"""The scans that each fold's network is tested on; it is trained on all others."""


def make_folds(scans: Sequence[Scan], number: int, seed: int) -> Folds:
    """Patients in the order of their lesion volume, so many at a time, each of these to a fold of its own by lot.

    Raises InputRefused for fewer patients than folds.
    """
    if number < 2:
        raise UsageError("a network must be tested on others than those that it was trained on", do="--folds 2 or more")
    volumes: dict[str, float] = defaultdict(float)
    for scan in scans:
        volumes[scan.patient] = max(volumes[scan.patient], scan.lesion_ml)
    if len(volumes) < number:
        raise InputRefused(
            "there are fewer patients than folds",
            found=f"{len(volumes)} patients, {number} folds",
            do=f"--folds {len(volumes)}, or add patients" if len(volumes) > 1 else "add patients",
        )
    ordered = sorted(volumes, key=lambda patient: (volumes[patient], patient))
    lots, fold = random.Random(seed), dict[str, int]()
    for start in range(0, len(ordered), number):
        block = ordered[start : start + number]
        fold |= dict(zip(block, lots.sample(range(number), len(block)), strict=True))
    return tuple(tuple(scan for scan in scans if fold[scan.patient] == index) for index in range(number))


def read_folds(path: Path, scans: Sequence[Scan]) -> Folds:
    """Folds as nnU-Net's `splits_final.json` has them: of each fold the names under "val". Raises InputRefused."""
    by_name = {scan.name: scan for scan in scans}
    try:
        named = [list(fold["val"]) for fold in json.loads(path.read_text(encoding="utf-8"))]
        folds = tuple(tuple(by_name[name] for name in fold) for fold in named)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputRefused(
            "the folds can't be read",
            where=path,
            found=f"{type(error).__name__}: {error}",
            do='write nnU-Net\'s [{"train": [...], "val": [...]}, ...] with names of the bank, without case_ and .npz',
        ) from error
    times_named = Counter(name for fold in named for name in fold)
    if twice := sorted(name for name, times in times_named.items() if times > 1):
        raise InputRefused(
            "scans are named twice", where=path, found=", ".join(twice[:5]), do="let each be tested once"
        )
    if left := sorted(set(by_name) - set(times_named)):
        raise InputRefused("scans are in no fold", where=path, found=", ".join(left[:5]), do="add them to a fold's val")
    return folds


def write_folds(folds: Folds, path: Path) -> None:
    """The same, so that nnU-Net can be trained on the very folds."""
    names = [[scan.name for scan in fold] for fold in folds]
    splits = [{"train": sorted(_others(names, number)), "val": val} for number, val in enumerate(names)]
    path.write_text(json.dumps(splits, indent=1) + "\n", encoding="utf-8")


def _others(names: Sequence[Sequence[str]], number: int) -> list[str]:
    return [name for index, fold in enumerate(names) if index != number for name in fold]


def training_scans(folds: Folds, number: int) -> list[Scan]:
    """What the network of one fold is trained on."""
    return [scan for index, fold in enumerate(folds) if index != number for scan in fold]


def check_folds(folds: Folds, beside: Iterable[Scan] = ()) -> None:
    """Raise InputRefused where a network would be tested on a patient, or an image, that it was trained on, or trained without a lesion.

    `beside` are scans that every network is trained on, too.
    """
    whose: dict[str, Scan] = {}
    fold_of: dict[str, int] = {}
    for number, fold in enumerate(folds):
        for scan in fold:
            if fold_of.setdefault(scan.patient, number) != number:
                raise InputRefused(
                    "scans of one patient lie in two folds",
                    where=scan.path,
                    found=f"patient {scan.patient}, folds {fold_of[scan.patient]} and {number}",
                    do="let them lie in one, or leave --splits out",
                )
            twin = whose.setdefault(scan.digest, scan)
            if fold_of[twin.patient] != number:
                raise InputRefused(
                    "one image lies in two folds, under two names",
                    where=scan.path,
                    found=f"the same DWI as {twin.path.name}",
                    do="delete one of the two from the bank, or give both the same patient in the worklist",
                )
    for scan in beside:
        if scan.digest in whose:
            raise InputRefused(
                "an image of the bank lies in the simulated bank, too",
                where=scan.path,
                found=f"the same DWI as {whose[scan.digest].path.name}",
                do="delete it from one of them: networks would be tested on what they were trained on",
            )
    if not any(scan.lesion_ml for fold in folds for scan in fold):
        raise InputRefused("no scan of the bank has a lesion", do="check the masks that the bank was made of")
    for number in range(len(folds)):
        if not any(scan.lesion_ml for scan in training_scans(folds, number)):
            raise InputRefused(f"fold {number} would be trained without a lesion", do="use more patients")
