"""Describe a path: every DICOM series in it, which one would be read for each modality, and why others would not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ensemble.errors import InputRefused
from ensemble.geometry import Grid
from ensemble.readers.base import RawImage
from ensemble.readers.dicom.read import Examination, is_read_as_dicom, open_examination
from ensemble.readers.dicom.series import Series
from ensemble.readers.imagefile import read_image
from ensemble.types import Modality

_LABEL = "DICOM"


@dataclass(frozen=True)
class SeriesFinding:
    """What `inspect` found out about one DICOM series."""

    number: int | None
    description: str
    kind: str
    images: int
    b_values: tuple[float, ...]
    """The b-values stated by its images, s/mm^2."""
    volumes: int
    """0 where it can't be put in order."""
    grid: Grid | None
    problem: str
    """Why it can't be put in order."""
    chosen_for: tuple[Modality, ...]
    unfit: Mapping[Modality, str]
    """Why it is not taken for a modality."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class InspectedPath:
    """What a file, folder or archive contains: its images, or why they are refused, and its DICOM series."""

    path: Path
    is_dicom: bool
    images: Mapping[Modality, RawImage | Grid | InputRefused]
    """By modality: the image that is read (of a DICOM folder only the grid, unless requested), or why none is."""
    notes: Mapping[Modality, tuple[str, ...]]
    series: tuple[SeriesFinding, ...] = ()
    objects: tuple[tuple[str, str], ...] = ()
    """DICOM files without images, with their kind."""
    unread: tuple[tuple[str, str], ...] = ()
    """Files that look like DICOM but can't be read, with the reason."""


@dataclass
class _Answers:
    images: dict[Modality, RawImage | Grid | InputRefused] = field(default_factory=dict)
    notes: dict[Modality, tuple[str, ...]] = field(default_factory=dict)
    chosen: dict[Modality, Series] = field(default_factory=dict)


def inspect_path(path: Path, requested: Modality | None) -> InspectedPath:
    """Examine a file, folder or archive. Pixels are read only of the `requested` image, or of an image file.

    What can't be read, the whole path too, is part of the finding.
    """
    if is_read_as_dicom(path):
        try:
            with open_examination(path, requested.label if requested else _LABEL) as examination:
                return inspect_examination(examination, requested)
        except InputRefused as refused:
            return InspectedPath(path, True, dict.fromkeys((requested,) if requested else Modality, refused), {})
    answers = _Answers()
    for modality in (requested,) if requested else (Modality.DWI,):
        try:
            image = read_image(path, modality)
            answers.images[modality], answers.notes[modality] = image, image.notes
        except InputRefused as refused:
            answers.images[modality] = refused
    return InspectedPath(path, False, answers.images, answers.notes)


def inspect_examination(examination: Examination, requested: Modality | None) -> InspectedPath:
    """Describe an open examination. Pixels are read only of the `requested` image."""
    answers = _Answers()
    for modality in (requested,) if requested else tuple(Modality):
        try:
            series, notes = examination.chosen(modality)
            answers.chosen[modality], answers.notes[modality] = series, tuple(notes)
            if requested:
                image = examination.read(modality)
                answers.images[modality], answers.notes[modality] = image, image.notes
            else:
                answers.images[modality] = examination.stack(series, modality.label).grid
        except InputRefused as refused:
            answers.images[modality] = refused
    return InspectedPath(
        examination.path,
        True,
        answers.images,
        answers.notes,
        tuple(_of_series(series, examination, answers.chosen) for series in examination.series),
        tuple((examination.place_of(file), what) for file, what in examination.objects),
        tuple((examination.place_of(file), f"{problem.what}: {problem.found}") for file, problem in examination.unread),
    )


def _of_series(series: Series, examination: Examination, chosen: Mapping[Modality, Series]) -> SeriesFinding:
    grid: Grid | None = None
    volumes, problem, notes = 0, "", tuple[str, ...]()
    if not series.frames[0].instance.other:
        try:
            stack = examination.stack(series, _LABEL)
            grid, volumes, notes = stack.grid, len(stack.volumes), stack.notes
        except InputRefused as refused:
            problem = f"{refused.what} ({refused.found})" if refused.found else refused.what
    return SeriesFinding(
        series.number,
        series.description,
        str(series.kind),
        len(series.frames),
        series.told_b,
        volumes,
        grid,
        problem,
        tuple(modality for modality, each in chosen.items() if each is series),
        {modality: why for modality in Modality if (why := series.unfit(modality))},
        notes,
    )
