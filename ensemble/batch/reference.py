"""`members fit-reference DATASET`: make a user's own dataset the reference for the trust score."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from ensemble.batch.each_case import segment_each
from ensemble.batch.find import find_cases
from ensemble.config import RunConfig
from ensemble.errors import InputRefused
from ensemble.pipeline import load_from_config
from ensemble.publish import check_writable
from ensemble.trust.evidence import gather_evidence
from ensemble.trust.fit import fit_user_reference
from ensemble.trust.reference import FOLDER, MIN_CASES, write_references

log = logging.getLogger(__name__)


def fit_reference(dataset: Path, config: RunConfig) -> None:
    """Segment every case of a dataset without mirroring, and write the reference of their features and intensities into `<weights>/trust`.

    Refused cases are skipped with a log message. A calibration of the expected Dice is kept if it was made with these weights.
    Raises InputRefused if fewer than `MIN_CASES` are left, WeightsBroken, and UsageError where nothing can be written.
    """
    cases = find_cases(dataset, config.weights_folder / FOLDER)
    if len(cases) < MIN_CASES:
        raise _too_few(dataset, f"{len(cases)} cases")
    check_writable(config.weights_folder / FOLDER)
    ensemble = load_from_config(replace(config, tta="none", trust=True))
    usual = [gather_evidence(result) for result in segment_each(cases, ensemble)]
    if len(usual) < MIN_CASES:
        raise _too_few(dataset, f"{len(usual)} of {len(cases)} cases could be segmented")
    references, calibration = fit_user_reference(usual, ensemble, dataset.resolve().name)
    write_references(references, calibration.as_json(), config.weights_folder)
    for name in ensemble.digests:
        if (member := references.members.get(name)) is None:
            log.info("%s: no reference, because its features can't be computed", name)
        else:
            spectrum = member.whole.spectrum
            log.info(
                "%s: %d of %d feature modes are stable in %d cases",
                name,
                spectrum.modes,
                len(spectrum.mean),
                spectrum.n,
            )
    if not calibration.slopes:
        log.info(
            "note: these weights have no calibration of the expected Dice; verdicts use only how usual the images look"
        )
    log.info("written: %s", config.weights_folder / FOLDER)


def _too_few(dataset: Path, found: str) -> InputRefused:
    return InputRefused(
        "the dataset has too few cases for a reference",
        where=dataset,
        found=found,
        do=f"give {MIN_CASES} or more, of the scanner and protocol that later cases come from",
    )
