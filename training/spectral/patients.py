"""Embeddings of simulated patients, kept in a folder: `python -m training.spectral.patients`.

Each patient of the fixed validation set is segmented once without mirroring, so that small disputed findings are known, too, and every
stage of every encoder is asked about his regions. `flair3d without FLAIR` is flair3d with its FLAIR channel blank.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.errors import UsageError
from ensemble.families.base import EncodingMember
from ensemble.families.spec import MIN_DISPUTED_ML
from ensemble.memory import keep_freed_memory
from ensemble.metrics import lesion_components
from ensemble.pipeline import Ensemble, Result, load_from_config, segment_raw
from ensemble.prepare.case import PreparedCase
from ensemble.progress import SilentWatcher
from ensemble.spectral.embeddings import (
    CaseEmbeddings,
    EmbeddedRegion,
    RegionKind,
    embed,
    open_encoders,
    select_regions,
    window_around,
)
from ensemble.types import BoolArray, Modality
from ensemble.volume import Volume
from training.command import call
from training.evaluate import Truth, real_cases
from training.simulate import SHARED, VALIDATION_SEED
from training.trust_patients import Patient

log = logging.getLogger(f"ensemble.{__name__}")

FOLDER = Path(".train/spectral")
WITHOUT_FLAIR = "flair3d without FLAIR"


@dataclass(frozen=True)
class Observer:
    """Members as they segment, and their encoders."""

    ensemble: Ensemble
    encoders: Sequence[EncodingMember]

    @classmethod
    def of(cls, weights: Path, members: tuple[str, ...] | None = None) -> Observer:
        """Load both; every small finding is kept, also what the product leaves out."""
        ensemble = load_from_config(
            RunConfig(weights, members, device="cpu", tta="none", trust=False, min_disputed_ml=0.0)
        )
        return cls(ensemble, open_encoders(ensemble.specs, "cpu"))

    @property
    def digest(self) -> str:
        """Of all weights."""
        told = json.dumps({name: dict(files) for name, files in self.ensemble.digests.items()}, sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def look(self, truth: Truth) -> CaseEmbeddings:
        """Segment a case and ask the encoders."""
        result = segment_raw(truth.raw, self.ensemble, SilentWatcher())
        case, lesion = result.case, truth.mask
        specks = small_disputed_of(result, lesion if lesion is not None else np.zeros_like(result.mask.array))
        regions = [*(select_regions(case, lesion) if lesion is not None else []), *specks]
        found = embed(case, regions or [EmbeddedRegion(RegionKind.BRAIN, 0.0)], self.encoders)
        blind = self._without_flair(case, found.regions)
        return replace(found, stages={**found.stages, **blind})

    def _without_flair(
        self, case: PreparedCase, regions: Sequence[EmbeddedRegion]
    ) -> dict[str, tuple[np.ndarray, ...]]:
        takers = [encoder for encoder in self.encoders if encoder.name == "flair3d"]
        if not takers or Modality.FLAIR not in case.modalities:
            return {}
        blind = embed(
            replace(case, images=_blind(case.images), tissue_normalized=_blind(case.tissue_normalized)), regions, takers
        )
        return dict(zip((WITHOUT_FLAIR,), blind.stages.values(), strict=True))


def _blind(images: Mapping[Modality, Volume]) -> dict[Modality, Volume]:
    return {modality: image for modality, image in images.items() if modality is not Modality.FLAIR}


def small_disputed_of(result: Result, lesion: BoolArray) -> list[EmbeddedRegion]:
    """Return windows centred on small disputed components: below the size limit, and without a voxel on which all voters agree."""
    labels, count = lesion_components(result.mask.array)
    voters, limit = len(result.fused.voters), MIN_DISPUTED_ML
    found = []
    for number in range(1, count + 1):
        component = labels == number
        small = component.sum() * result.case.grid.voxel_ml < limit
        if small and int(result.fused.votes.array[component].max()) < voters:
            true = bool(lesion[component].any())
            found.append(window_around(component, RegionKind.SMALL_DISPUTED, result.case.grid.voxel_ml, true=true))
    return found


def embeddings(
    cases: Iterable[tuple[str, Callable[[], Truth]]], observer: Observer, folder: Path
) -> list[CaseEmbeddings]:
    """What cases of these names show; made and looked at only where the folder does not have them."""
    place, found = folder / observer.digest, []
    place.mkdir(parents=True, exist_ok=True)
    for name, truth in cases:
        path = place / f"{name}.npz"
        if not path.exists():
            observer.look(truth()).save(path)
            log.info("%s", name)
        found.append(CaseEmbeddings.read(path))
    return found


def patients(number: int) -> list[Patient]:
    """The first of the simulated validation set, all with FLAIR."""
    return [Patient(f"simulated_{at:03d}", VALIDATION_SEED + at) for at in range(number)]


def simulated(number: int, shared: Path, caches: Sequence[Path]) -> Iterator[tuple[str, Callable[[], Truth]]]:
    """Names of these patients, and what simulates each."""
    return ((patient.name, partial(patient.truth, shared, caches)) for patient in patients(number))


def simulated_embeddings(number: int, config: RunConfig) -> list[CaseEmbeddings]:
    """Embeddings of so many patients, by the members of a run; kept in `FOLDER`. Raises UsageError without the simulator's material."""
    _check_material(SHARED)
    torch.set_num_threads(1)
    observer = Observer.of(config.weights_folder, config.members)
    return embeddings(simulated(number, SHARED, (FOLDER / "cases",)), observer, FOLDER)


def _check_material(shared: Path) -> None:
    if missing := [name for name in ("anatomy", "lesions") if not (shared / name).is_dir()]:
        raise UsageError(
            "there is nothing to simulate patients of",
            where=shared,
            found=f"no folder {missing[0]}",
            do="put the simulator's material there (training/README.md), or give cases of your own: --dataset DATASET",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the folder."""
    parser = argparse.ArgumentParser(prog="python -m training.spectral.patients", description=__doc__)
    parser.add_argument("--weights", type=Path, default=SHIPPED_WEIGHTS)
    parser.add_argument("--simulated", type=int, default=120, metavar="N", help="patients of the validation set")
    parser.add_argument("--real", type=Path, help="folder of real cases, too")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where embeddings are kept (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="folder with simulated validation cases, to read from")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with anatomy/ and lesions/")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    return call(lambda: _fill(options))


def _fill(options: argparse.Namespace) -> int:
    _check_material(options.shared)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    observer = Observer.of(options.weights)
    if options.real:
        embeddings(
            ((truth.raw.name, partial(_same, truth)) for truth in real_cases(options.real)), observer, options.folder
        )
    caches = (options.folder / "cases", *((options.cache,) if options.cache else ()))
    embeddings(simulated(options.simulated, options.shared, caches), observer, options.folder)
    return 0


def _same(truth: Truth) -> Truth:
    return truth


if __name__ == "__main__":
    raise SystemExit(main())
