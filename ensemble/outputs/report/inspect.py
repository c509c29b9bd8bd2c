"""The output of `inspect`: a table for people, or JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ensemble.errors import InputRefused, UsageError
from ensemble.geometry import Grid
from ensemble.outputs.formats.image import write as write_volume
from ensemble.publish import publish
from ensemble.readers.base import RawImage
from ensemble.readers.dicom.series import format_b_values
from ensemble.readers.inspect import InspectedPath, SeriesFinding
from ensemble.readers.names import image_suffix
from ensemble.text import escape_invisible
from ensemble.types import Modality
from ensemble.volume import Volume

_HEADINGS = ("", "series", "description", "kind", "images", "b (s/mm^2)", "volumes", "geometry")


def as_lines(finding: InspectedPath) -> Iterator[str]:
    """Yield the text lines that describe an inspected path."""
    yield f"{finding.path}:"
    if finding.is_dicom:
        if finding.series:
            yield from _table([_HEADINGS, *(_row(series) for series in finding.series)])
        for series in finding.series:
            name = series.description or series.number or "without description"
            yield from (f"  ! {name}: {remark}" for remark in (series.problem, *series.notes) if remark)
        yield from (f"  no image: {file} ({what})" for file, what in finding.objects)
        yield from (f"  can't be read: {file} ({why})" for file, why in finding.unread)
    if len({id(image) for image in finding.images.values()}) == 1 < len(finding.images):  # nothing could be opened
        yield from f"refused: {next(iter(finding.images.values()))}".split("\n")
        return
    for modality, image in finding.images.items():
        yield from _answer(modality.label, image, finding.notes.get(modality, ()))


def as_json(finding: InspectedPath) -> dict[str, Any]:
    """Return the description of an inspected path as JSON data."""
    return {
        "path": str(finding.path),
        "dicom": finding.is_dicom,
        "series": [_series_as_json(series) for series in finding.series],
        "no_image": [{"file": file, "what": what} for file, what in finding.objects],
        "unread": [{"file": file, "why": why} for file, why in finding.unread],
        "images": {
            modality.value: _refusal(image)
            if isinstance(image, InputRefused)
            else {"grid": _grid(_grid_of(image)), "notes": list(finding.notes.get(modality, ()))}
            for modality, image in finding.images.items()
        },
    }


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(series: SeriesFinding) -> tuple[str, ...]:
    return (
        ",".join(modality.label for modality in series.chosen_for),
        "" if series.number is None else str(series.number),
        escape_invisible(series.description) or "-",
        series.kind,
        str(series.images),
        format_b_values(series.b_values) or "-",
        str(series.volumes or "-"),
        series.grid.describe() if series.grid else "-",
    )


def _answer(label: str, image: RawImage | Grid | InputRefused, notes: Sequence[str]) -> Iterator[str]:
    if isinstance(image, InputRefused):
        yield from f"{label}: refused: {image}".split("\n")
        return
    yield f"{label}: {_grid_of(image).describe()}"
    if isinstance(image, RawImage):
        yield f"  values from {image.volume.array.min():.6g} to {image.volume.array.max():.6g}"
    yield from (f"  note: {note}" for note in notes)


def _grid_of(image: RawImage | Grid) -> Grid:
    return image.volume.grid if isinstance(image, RawImage) else image


def _series_as_json(series: SeriesFinding) -> dict[str, Any]:
    return {
        "number": series.number,
        "description": series.description,
        "kind": series.kind,
        "images": series.images,
        "volumes": series.volumes,
        "b_values": list(series.b_values),
        "grid": _grid(series.grid) if series.grid else None,
        "problem": series.problem,
        "notes": list(series.notes),
        "chosen_for": [modality.value for modality in series.chosen_for],
        "not_taken": {modality.value: why for modality, why in series.unfit.items()},
    }


def _grid(grid: Grid) -> dict[str, Any]:
    return {
        "size": list(grid.size),
        "spacing_mm": list(grid.spacing_mm),
        "origin_mm": list(grid.origin_mm),
        "direction": list(grid.direction),
    }


def _refusal(refused: InputRefused) -> dict[str, Any]:
    return {"refused": {"what": refused.what, "where": refused.where, "found": refused.found, "do": refused.do}}


def inspection_error(finding: InspectedPath, requested: Modality | None) -> InputRefused | None:
    """Return the error to report: if the `requested` modality can't be read or, without one, if none can be. Otherwise None."""
    refusals = [image for image in finding.images.values() if isinstance(image, InputRefused)]
    return refusals[0] if refusals and (requested or len(refusals) == len(finding.images)) else None


def check_destination(path: Path, source: Path) -> None:
    """Raise UsageError if an image can't be written to a path because of its suffix, or would replace its source."""
    suffix = image_suffix(path)
    if not suffix or suffix in (".mhd", ".nhdr"):
        raise UsageError(
            "no image can be written in this format",
            where=path,
            found=f"a name that ends in {suffix}" if suffix else "a name without the suffix of an image format",
            do="choose a path that ends in .nii.gz, .nii, .mha or .nrrd",
        )
    try:
        is_source = path.exists() and path.samefile(source)
    except OSError:
        return  # reading or writing will say so
    if is_source:
        raise UsageError("the image would overwrite its own source", where=path, do="choose another path")


def save_volume(volume: Volume, path: Path) -> None:
    """Write a volume to a path atomically. Raises UsageError if it can't be written."""
    try:
        with publish(path.parent) as staging:
            write_volume(volume, staging / path.name)
    except ValueError as error:
        raise UsageError(
            "the format can't hold this image", where=path, found=str(error), do="choose a path that ends in .mha"
        ) from error
