"""`members diagnose`: spectral diagnosis of each encoder stage on a dataset, or on simulated patients."""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import replace
from pathlib import Path

from ensemble.batch.each_case import segment_each
from ensemble.batch.find import find_cases
from ensemble.config import RunConfig
from ensemble.errors import InputRefused, UsageError
from ensemble.evaluate.plots import as_png
from ensemble.pipeline import load_from_config
from ensemble.publish import check_writable, publish
from ensemble.spectral.diagnosis import MIN_CASES, StageDiagnosis, as_json, diagnose, format_table
from ensemble.spectral.embeddings import CaseEmbeddings, embed, open_encoders, select_regions
from ensemble.spectral.plots import draw_diagnosis

log = logging.getLogger(__name__)

#: The module that simulates patients; it is only in the repository, not in the wheel or the image.
_SIMULATED = "training.spectral.patients"


def diagnose_dataset(dataset: Path, out: Path, config: RunConfig) -> None:
    """Segment every case of a dataset without mirroring, diagnose the encoders, and write table, JSON and pictures into `out`.

    The lesions are those of the predicted mask. Refused cases are skipped with a log message. Raises InputRefused if fewer than
    `MIN_CASES` remain, WeightsBroken, and UsageError if nothing can be written.
    """
    cases = find_cases(dataset, out)
    if len(cases) < MIN_CASES:
        raise _too_few(dataset, f"{len(cases)} cases")
    check_writable(out)
    ensemble = load_from_config(replace(config, tta="none", trust=False))
    encoders = open_encoders(ensemble.specs, ensemble.settings.device)
    embedded = [
        embed(result.case, select_regions(result.case, result.mask.array), encoders)
        for result in segment_each(cases, ensemble)
    ]
    if len(embedded) < MIN_CASES:
        raise _too_few(dataset, f"{len(embedded)} of {len(cases)} cases could be segmented")
    _write(diagnose(embedded), out)


def diagnose_simulated(number: int, out: Path, config: RunConfig) -> None:
    """Diagnose the encoders on patients of the simulated validation set, and write the same files into `out`.

    Raises UsageError if there are too few patients or the simulator is not installed.
    """
    if number < MIN_CASES:
        raise UsageError(
            "too few simulated patients for a spectral diagnosis",
            found=f"--simulated {number}",
            do=f"ask for {MIN_CASES} or more",
        )
    check_writable(out)
    try:
        patients = importlib.import_module(_SIMULATED)
    except ModuleNotFoundError as error:
        raise UsageError(
            "--simulated needs the simulator, which only a clone of the repository has",
            found=f"the Python module {error.name} is missing",
            do="run it in a clone of the repository, with requirements.txt installed; or give your own cases: --dataset DATASET",
        ) from error
    embedded: list[CaseEmbeddings] = patients.simulated_embeddings(number, config)
    _write(diagnose(embedded), out)


def _write(stages: list[StageDiagnosis], out: Path) -> None:
    table = format_table(stages)
    with publish(out) as draft:
        (draft / "diagnosis.md").write_text(table + "\n", encoding="utf-8")
        (draft / "diagnosis.json").write_text(json.dumps(as_json(stages), indent=1) + "\n", encoding="utf-8")
        for member in dict.fromkeys(stage.member for stage in stages):
            own = [stage for stage in stages if stage.member == member]
            (draft / f"{member.replace(' ', '_')}.png").write_bytes(as_png(draw_diagnosis(own)))
    for line in table.split("\n"):
        log.info("%s", line)
    log.info("written: %s", out)


def _too_few(dataset: Path, found: str) -> InputRefused:
    return InputRefused(
        "too few cases for a spectral diagnosis",
        where=dataset,
        found=found,
        do=f"give {MIN_CASES} or more, laid out as for batch",
    )
