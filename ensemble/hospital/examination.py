"""Choose the images of a case from one examination as a scanner or archive sends it, and record why."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensemble.errors import InputRefused
from ensemble.outputs.report.inspect import as_json
from ensemble.readers.base import RawCase, RawImage
from ensemble.readers.dicom.read import Examination, open_examination
from ensemble.readers.inspect import inspect_examination
from ensemble.types import Modality


@dataclass(frozen=True)
class ExaminationCase:
    """The images chosen from an examination, and the record of the choice."""

    raw: RawCase
    record: dict[str, Any]
    """Every series, what it shows, for what it was taken and why not: as `inspect --json` has it."""


def read_examination(path: Path, name: str) -> ExaminationCase:
    """Read DWI, ADC and FLAIR from a folder or .zip of DICOM that holds one examination.

    Without an ADC series, ADC will be computed from the DWI. FLAIR is omitted, with a note, if there is none, several, or none that can be
    read. Raises InputRefused if DWI or ADC can't be read or identified with certainty, and for several studies.
    """
    started = time.perf_counter()
    with open_examination(path, "DICOM") as examination:
        _refuse_several(examination)
        shown = {str(series.kind) for series in examination.series}
        with_adc = Modality.ADC.label in shown
        images = {Modality.DWI: examination.read(Modality.DWI, with_low_b=not with_adc)}
        if with_adc:
            images[Modality.ADC] = examination.read(Modality.ADC)
        if Modality.FLAIR.label in shown:
            try:
                images[Modality.FLAIR] = examination.read(Modality.FLAIR)
            except InputRefused as refused:
                why = f"{refused.what} ({refused.found})" if refused.found else refused.what
                images[Modality.DWI] = _noting(images[Modality.DWI], f"FLAIR: not used: {why}")
        record = as_json(inspect_examination(examination, None))
    return ExaminationCase(RawCase(name, images, time.perf_counter() - started), record)


def _refuse_several(examination: Examination) -> None:
    studies: dict[str, str] = {}
    for series in examination.series:
        studies.setdefault(series.frames[0].instance.study, series.title)
    if len(studies) > 1:
        raise InputRefused(
            "the folder contains series of several studies; only one examination can be segmented at a time",
            where=examination.path,
            found="; ".join(f"study {uid or 'without UID'}: {title} and others" for uid, title in studies.items()),
            do="give only the series of one study",
        )


def _noting(image: RawImage, note: str) -> RawImage:
    return replace(image, notes=(*image.notes, note))
