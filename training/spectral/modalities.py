"""Does another modality determine more modes? `python -m training.spectral.modalities`, on cached embeddings and small encoders.

Side by side: the shipped encoders, flair3d with its FLAIR channel blank, and the small ones of `training.spectral.small`, which differ in
the images they see alone. The same simulated patients for all of a group. How well few windows tell a lesion from none is measured
as in `training.spectral.few_shot`, by the zeta filter and by the best of the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ensemble.errors import UsageError
from ensemble.members.manifest import find_members, weight_digests
from ensemble.memory import keep_freed_memory
from ensemble.prepare.case import prepare_raw
from ensemble.spectral.diagnosis import count_recoverable_modes, feature_spectrum, select_features
from ensemble.spectral.embeddings import CaseEmbeddings, RegionKind, embed, open_encoders, select_regions
from training.command import call
from training.simulate import SHARED
from training.spectral.few_shot import FILTER, OTHERS, measure, windows
from training.spectral.kept import add_kept, kept
from training.spectral.patients import FOLDER, patients
from training.spectral.small import FOLDER as SMALL
from training.spectral.small import IMAGES

SIZES, DRAWS = (20, 80), 20


def small_embeddings(
    weights: Path, number: int, folder: Path, shared: Path, caches: Sequence[Path]
) -> list[CaseEmbeddings]:
    """What the small encoders make of so many patients of the validation set; kept in a folder, beside those of other weights."""
    if missing := [name for name in IMAGES if not (weights / name / "plans.json").exists()]:
        raise UsageError(
            "small encoders are missing",
            where=weights,
            found=f"no {', '.join(missing)}",
            do="train them: python -m training.spectral.small --bank BANK",
        )
    specs = find_members(weights)
    told = json.dumps({spec.name: dict(weight_digests(spec)) for spec in specs}, sort_keys=True)
    place = folder / "small" / hashlib.sha256(told.encode()).hexdigest()[:12]
    place.mkdir(parents=True, exist_ok=True)
    encoders, found = open_encoders(specs, "cpu"), []
    for patient in patients(number):
        path = place / f"{patient.name}.npz"
        if not path.exists():
            truth = patient.truth(shared, caches)
            case = prepare_raw(truth.raw)
            assert truth.mask is not None  # every simulated patient has one
            embed(case, select_regions(case, truth.mask), encoders).save(path)
        found.append(CaseEmbeddings.read(path))
    return found


def table(cases: Sequence[CaseEmbeddings], members: Sequence[str], stage: int, draws: int) -> list[str]:
    """A row an encoder: stable modes of whole brains and of lesion windows, and AUC of few windows."""
    own = [case for case in cases if set(members) <= set(case.stages)]
    rows = []
    for member in members:
        number = stage - 1
        brain = feature_spectrum(select_features(own, member, number, RegionKind.BRAIN), draws)
        lesion = count_recoverable_modes(select_features(own, member, number, RegionKind.LESION).features)
        without, with_lesion = windows(own, member, number)
        cells = []
        for row in measure(without, with_lesion, SIZES, draws):
            mean, low, high = row.summary(FILTER)
            best = max(row.summary(name)[0] for name in OTHERS)
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f}); {best:.3f}")
        recovery, (_, _, _, low, high) = brain.recovery, brain.by_size[-1]
        rows.append(
            f"| {member} | {brain.dimensions} | {len(own)} | {recovery.crossing:.1f} ({low:.1f} to {high:.1f}) | {recovery.gap:.2f} "
            f"| {len(with_lesion.features)} | {lesion.crossing:.1f} | {lesion.gap:.2f} | {' | '.join(cells)} |"
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m training.spectral.modalities", description=__doc__)
    add_kept(parser)
    parser.add_argument(
        "--small", type=Path, default=SMALL, help="weights folder of the small encoders (default: %(default)s)"
    )
    parser.add_argument("--stage", type=int, default=3, help="of the encoders, from 1 (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--cache", type=Path, help="folder with simulated validation cases, to read from")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with anatomy/ and lesions/")
    parser.add_argument(
        "--embed-only", action="store_true", help="keep what the small encoders make of the patients, and end"
    )
    options = parser.parse_args(arguments)
    return call(lambda: _print(options))


def _print(options: argparse.Namespace) -> int:
    keep_freed_memory()
    torch.set_num_threads(1)
    caches = (FOLDER / "cases", *((options.cache,) if options.cache else ()))
    small = small_embeddings(options.small, options.simulated, options.folder, options.shared, caches)
    if options.embed_only:
        return 0
    print(
        "| encoder | D | patients | K(N), whole brain (80 % of them) | gap / floor | lesion windows | K(N) | gap / floor "
        f"| {' | '.join(f'AUC of {n}: filter; best other' for n in (*SIZES, 'all'))} |"
    )
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |" + " --- |" * (len(SIZES) + 1))
    shipped = kept(options)
    for group, members in ((shipped, list(shipped[0].stages)), (small, list(IMAGES))):
        for line in table(group, members, options.stage, options.draws):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
