"""Members for your own data: `python -m training.fit MEMBER|all --bank BANK --out WEIGHTS --folds 5 [--start-from model_weights]`.

From a bank of patients (`training.dataset`) to a weights folder for `--weights`: a network a fold, calibrated and measured on the
patients that it was not trained on. What is unfinished lies in WEIGHTS.work; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ensemble.config import RunConfig, Tta
from ensemble.errors import InputRefused, UsageError
from ensemble.families.base import InferenceSettings
from ensemble.families.registry import family_of
from ensemble.families.spec import MIN_DISPUTED_ML
from ensemble.families.spec import MemberSpec as Described
from ensemble.files import file_sha256
from ensemble.members.manifest import MANIFEST
from ensemble.memory import keep_freed_memory
from ensemble.pipeline import load_from_config, segment_prepared
from ensemble.progress import SilentWatcher
from ensemble.publish import publish_folder, write_json
from ensemble.trust.evidence import gather_evidence
from ensemble.trust.fit import fit_user_reference
from ensemble.trust.reference import MIN_CASES, write_references
from ensemble.types import ignore_progress
from training import bank
from training.batches import Bank, Mixed, Source
from training.calibrate import Patient, Rule, choose_rule, shift
from training.command import call
from training.drafts import draft_of
from training.fit_report import Fitted, Tested, write_reports
from training.folds import Folds, check_folds, make_folds, read_folds, training_scans, write_folds
from training.manifest import entry
from training.members import MEMBERS, MemberSpec
from training.train import CHECKPOINT, LEARNING_RATE, Length, Recipe, train

log = logging.getLogger(f"ensemble.{__name__}")

ABOUT = "fit.json"
FINE_TUNING_RATE = 6e-4  # of the last parts of the shipped weights' training


@dataclass(frozen=True)
class Fit:
    """The options of a call."""

    members: tuple[MemberSpec, ...]
    bank: Path
    simulated: tuple[Path, ...]
    """Simulated patients on which every network is trained as well: those in the bank at the start."""
    simulated_share: float
    out: Path
    work: Path
    length: Length
    start_from: Path | None
    rate: float
    seed: int
    device: str
    workers: int
    tta: Tta
    licence: str
    consent: str

    def folder(self, member: MemberSpec, fold: int) -> Path:
        """Where the network of one fold is trained."""
        return self.work / f"{member.name}_fold_{fold}"


def fit(asked: Fit, folds: Folds) -> bool:
    """Train, calibrate, measure, and write the weights folder. Returns False if it was stopped before the end."""
    for spec in asked.members:
        for number in range(len(folds)):
            if not _train_fold(asked, spec, folds, number):
                return False
    tested = predict_out_of_fold(asked, folds)
    rule = choose_rule([one.patient for one in tested], MIN_DISPUTED_ML)
    write_weights(asked, folds, tested, rule)
    write_usual(asked.out, folds[0], asked.device)
    return True


def _train_fold(asked: Fit, spec: MemberSpec, folds: Folds, number: int) -> bool:
    folder = asked.folder(spec, number)
    log.info("%s, fold %d of %d", spec.name, number, len(folds))
    source: Source = Bank(asked.bank, paths=[scan.path for scan in training_scans(folds, number)])
    if asked.simulated:
        simulated = Bank(asked.simulated[0].parent, paths=asked.simulated)
        source = Mixed(source, simulated, asked.simulated_share)
    seed = 1000 * asked.seed + 10 * number + sorted(MEMBERS).index(spec.name)
    recipe = Recipe(
        asked.length,
        seed,
        asked.device,
        asked.workers,
        _checkpoint(asked.start_from, spec.name, number) if asked.start_from else None,
        asked.rate,
        frozen_norm=asked.start_from is not None,
    )
    torch.manual_seed(seed)
    state = folder / "state.pt"
    return train(spec, source, folder, state, recipe, resume=state.exists())


def _checkpoint(weights: Path, member: str, fold: int) -> Path:
    """Return the checkpoint to start from: that of the same fold, if there are several. Raises UsageError."""
    places = [root / f"fold_{number}" / CHECKPOINT.name for root in (weights / member, weights) for number in (fold, 0)]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UsageError(
            f"--start-from holds no weights of {member}", where=weights, do=f"give a folder with {member}/{CHECKPOINT}"
        )
    return found


def predict_out_of_fold(asked: Fit, folds: Folds) -> list[Tested]:
    """Predict every patient with the networks that were not trained on this patient."""
    tested = []
    for number, fold in enumerate(folds):
        kept = {spec.name: _predict_fold(asked, spec, number, fold) for spec in asked.members}
        for scan in fold:
            case, lesion = bank.as_prepared(scan.path)
            said = {member: np.load(folder / f"{scan.name}.npy") for member, folder in kept.items()}
            patient = Patient(lesion, said, case.grid.voxel_ml).cut()
            tested.append(Tested(scan, number, patient, case.grid.spacing_zyx_mm))
    return tested


def _predict_fold(asked: Fit, spec: MemberSpec, number: int, scans: Sequence[bank.Scan]) -> Path:
    """The folder of what one network says (float16; z, y, x) of scans, `<name>.npy`; what lies there already is kept."""
    settings = InferenceSettings.of(RunConfig(tta=asked.tta), asked.device)
    folder = asked.folder(spec, number)
    kept = folder / f"said_{asked.tta}_{file_sha256(folder / CHECKPOINT)[:16]}"
    kept.mkdir(exist_ok=True)
    described = _described(spec, folder)
    member = None
    for scan in tqdm(scans, desc=f"{spec.name}, fold {number}", disable=None):
        path = kept / f"{scan.name}.npy"
        if path.exists():
            continue
        member = member or family_of(described).load(described, settings)
        case, _ = bank.as_prepared(scan.path)
        probability = member.predict(case, settings, ignore_progress).probability.array
        with draft_of(path) as draft:
            np.save(draft, probability.astype(np.float16))
    return kept


def _described(spec: MemberSpec, folder: Path) -> Described:
    return Described(spec.name, "nnunet", folder, spec.channels, "tissue_normalized", "canonical", spec.spacing_mm)


def write_weights(asked: Fit, folds: Folds, tested: Sequence[Tested], rule: Rule) -> None:
    """The weights folder, complete or not there: members with all folds, manifest, cards, and what was measured out of fold."""
    fitted = Fitted(
        tuple(spec.name for spec in asked.members),
        folds,
        cross_fitted(tested, len(folds)),
        rule,
        _about(asked, folds),
        asked.licence,
        asked.consent,
    )
    with publish_folder(asked.out, asked.work) as staging:
        for spec in asked.members:
            _gather(asked, spec, folds, staging / spec.name, rule.thresholds[spec.name])
        least = {"min_lesion_ml": rule.min_lesion_ml} if rule.min_lesion_ml else {}
        entries = []
        for spec in asked.members:
            weight = rule.weights.get(spec.name, 1.0)
            entries.append(entry(spec, staging, asked.licence, **({"weight": weight} if weight != 1 else {}), **least))
        write_json({"members": entries}, staging / MANIFEST)
        write_json(fitted.about, staging / ABOUT)
        write_folds(folds, staging / "splits_final.json")
        write_reports(fitted, tested, staging)
    log.info("written: %s", asked.out)


def write_usual(weights: Path, scans: Sequence[bank.Scan], device: str) -> None:
    """Write the references of the trust score, from the scans of the first fold. If there are too few, only log this.

    The features of a member are those of its first network, which was not trained on these scans.
    """
    if len(scans) < MIN_CASES:
        later = "members fit-reference makes one of other cases"
        log.info(
            "no reference for the trust score: the first fold holds %d scans, %d are needed; %s",
            len(scans),
            MIN_CASES,
            later,
        )
        return
    ensemble = load_from_config(
        RunConfig(weights=weights, device="cpu" if device == "cpu" else "cuda", tta="none", trust=True)
    )
    shown = [
        gather_evidence(segment_prepared(bank.as_prepared(scan.path)[0], ensemble, SilentWatcher()))
        for scan in tqdm(scans, desc="usual cases", disable=None)
    ]
    references, calibration = fit_user_reference(shown, ensemble, scans[0].path.resolve().parent.name)
    write_references(references, calibration.as_json(), weights)


def cross_fitted(tested: Sequence[Tested], folds: int) -> tuple[Rule, ...]:
    """Choose the rule for each fold's patients on all other folds, so that the measurement is independent of the choice."""
    rules = []
    for number in range(folds):
        others = [one.patient for one in tested if one.fold != number]
        rules.append(choose_rule(others, MIN_DISPUTED_ML))
    return tuple(rules)


def _gather(asked: Fit, spec: MemberSpec, folds: Folds, folder: Path, threshold: float) -> None:
    """A member's folder of the networks of all folds, their decision moved to 0.5."""
    for number in range(len(folds)):
        source, target = asked.folder(spec, number), folder / f"fold_{number}"
        target.mkdir(parents=True)
        shutil.copyfile(source / CHECKPOINT, target / CHECKPOINT.name)
        shift(target / CHECKPOINT.name, threshold)
        shutil.copyfile(source / "training.csv", target / "training.csv")
    shutil.copyfile(source / "plans.json", folder / "plans.json")
    description = json.loads((source / "dataset.json").read_text())
    scans = [scan for fold in folds for scan in fold]
    description |= {"numTraining": len(scans), "description": f"training.fit on {len(scans)} scans"}
    write_json(description, folder / "dataset.json")


def _about(asked: Fit, folds: Folds) -> dict[str, Any]:
    """What decides about the networks: another work folder's must be the same to be gone on from."""
    scans = [scan for fold in folds for scan in fold]
    digests = sorted(f"{scan.name} {scan.patient} {scan.digest}" for scan in scans)
    return {
        "members": [spec.name for spec in asked.members],
        "scans": len(scans),
        "patients": len({scan.patient for scan in scans}),
        "bank_sha256": hashlib.sha256("\n".join(digests).encode()).hexdigest(),
        "folds": [[scan.name for scan in fold] for fold in folds],
        "simulated_share": asked.simulated_share if asked.simulated else 0.0,
        "simulated": [path.name for path in asked.simulated],
        "steps": asked.length.steps,
        "minutes": asked.length.minutes,
        "start_from": str(asked.start_from) if asked.start_from else None,
        "rate": asked.rate,
        "seed": asked.seed,
    }


def _refuse_other(asked: Fit, about: Mapping[str, Any]) -> None:
    """Raise UsageError if the call would replace other files than those of an earlier fit, or continue a different fit."""
    if asked.out.is_dir() and any(asked.out.iterdir()) and not (asked.out / ABOUT).is_file():
        raise UsageError("the folder holds something else than fitted weights", where=asked.out, do="name a new folder")
    path = asked.work / ABOUT
    if path.is_file():
        before = json.loads(path.read_text())
        if other := sorted(key for key in about if key != "minutes" and before.get(key) != about[key]):
            raise UsageError(
                "another training lies in the work folder",
                where=asked.work,
                found=f"it differs in {', '.join(other)}",
                do="give its options to go on with it, delete it, or name another folder with --work",
            )
    asked.work.mkdir(parents=True, exist_ok=True)
    write_json(about, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.fit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("member", choices=(*sorted(MEMBERS), "all"))
    parser.add_argument("--bank", type=Path, required=True, help="made by python -m training.dataset")
    parser.add_argument("--out", type=Path, required=True, help="the weights folder to write")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--splits", type=Path, help="nnU-Net's splits_final.json, instead of --folds")
    parser.add_argument("--simulated", type=Path, help="bank of simulated patients to mix in (training.simulate)")
    parser.add_argument("--simulated-share", type=float, default=0.25, help="of what is seen (default: %(default)s)")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="of each network; the same command gives the same weights")
    length.add_argument("--minutes", type=float, help="of wall-clock time for each network")
    parser.add_argument("--start-from", type=Path, help="weights folder (or member's folder) to fine-tune")
    parser.add_argument(
        "--rate", type=float, help=f"highest learning rate (default: {LEARNING_RATE}, fine-tuning: {FINE_TUNING_RATE})"
    )
    parser.add_argument("--licence", help="of the weights, as your data allow it; goes into manifest and cards")
    parser.add_argument("--consent", help="your statement that the patients' images may be used; goes into the cards")
    parser.add_argument("--work", type=Path, help="folder for what is unfinished (default: WEIGHTS.work)")
    parser.add_argument("--tta", choices=("mirror", "none"), default="mirror", help="out of fold (default: mirror)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of PyTorch (default: all; another number, other last digits)")
    parser.add_argument(
        "--workers", type=int, help="processes that draw batches (default: none on a CPU, up to 8 for a GPU)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    return call(lambda: _command(options))


def _command(options: argparse.Namespace) -> int:
    scans = _scans(options.bank)
    folds = read_folds(options.splits, scans) if options.splits else make_folds(scans, options.folds, options.seed)
    if options.steps is not None and options.steps < 1:
        raise UsageError("--steps must be 1 or more", found=str(options.steps))
    simulated = _scans(options.simulated) if options.simulated else []
    check_folds(folds, simulated)
    if not 0 <= options.simulated_share < 1:
        raise UsageError("--simulated-share must be from 0 to below 1", found=str(options.simulated_share))
    if any(scan.real for scan in scans) and not (options.licence and options.consent):
        raise UsageError(
            "weights of patients need your statement of licence and consent",
            do='--licence CC-BY-4.0 --consent "ISLES\'22, public, CC BY 4.0" (as it is for your data): both go into the model cards',
        )
    names = sorted(MEMBERS) if options.member == "all" else [options.member]
    tta: dict[str, Tta] = {"mirror": "mirror", "none": "none"}
    asked = Fit(
        tuple(MEMBERS[name] for name in names),
        options.bank,
        tuple(scan.path for scan in simulated),
        options.simulated_share,
        options.out,
        options.work or options.out.absolute().with_name(options.out.name + ".work"),
        Length(options.minutes or 0.0, options.steps),
        options.start_from,
        options.rate or (FINE_TUNING_RATE if options.start_from else LEARNING_RATE),
        options.seed,
        options.device,
        _workers(options.device) if options.workers is None else options.workers,
        tta[options.tta],
        options.licence or "Apache-2.0",
        options.consent or "simulated patients only",
    )
    _refuse_other(asked, _about(asked, folds))
    if asked.start_from:
        for name in names:
            _checkpoint(asked.start_from, name, 0)  # missing requirements are reported now, not after hours
    if not fit(asked, folds):
        log.info("stopped: the same command goes on")
        return 143
    return 0


def _scans(folder: Path) -> list[bank.Scan]:
    paths = sorted(folder.glob("case_*.npz")) if folder.is_dir() else []
    if not paths:
        raise InputRefused("the bank holds no case", where=folder, do="make it with python -m training.dataset")
    return [bank.scan(path) for path in tqdm(paths, desc="bank", disable=None)]


def _workers(device: str) -> int:
    from ensemble.threads import available_processors

    return 0 if device == "cpu" else min(8, max(1, available_processors() - 1))


if __name__ == "__main__":
    sys.exit(main())
