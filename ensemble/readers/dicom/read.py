"""Read a folder or .zip of DICOM: choose the series of a modality, sort its slices, and check that none is missing.

Headers first, of all files; then the series is chosen by what headers say; then the chosen one alone is put in order, checked, and its
pixels are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensemble.errors import InputRefused
from ensemble.files import unreadable_reason
from ensemble.logging_setup import redirect_native_stderr
from ensemble.readers.b_values import SAME_SHELL, select_dwi, select_low_b, weighted_volume_indices
from ensemble.readers.base import RawImage, attach_notes
from ensemble.readers.dicom.facts import MALFORMED
from ensemble.readers.dicom.files import is_read_as_dicom, unpacked_files
from ensemble.readers.dicom.frames import AGAIN, FileProblem, Frame, read_frames
from ensemble.readers.dicom.header import NotDicom, read_header
from ensemble.readers.dicom.pixels import read_pixels, refuse_differing_copies
from ensemble.readers.dicom.series import Series, choose_series, group_into_series
from ensemble.readers.dicom.stack import Stack, build_stack, plane_of, refuse_unreadable_frame
from ensemble.readers.dicom.study import read_study_attributes
from ensemble.readers.geometry_checks import orthonormalize_direction
from ensemble.readers.names import ARCHIVE
from ensemble.readers.origin import DicomOrigin, SourceFrame, SourceSlice
from ensemble.readers.sources import link_notes
from ensemble.types import Modality
from ensemble.volume import Volume

#: Largest distance (in slice spacings) of an image from the position of the next slice for which it counts as that slice.
_NEXT_SLICE = 0.1

__all__ = ["Examination", "is_read_as_dicom", "modalities_in", "open_examination", "read_dicom"]


@dataclass(frozen=True, eq=False)
class Examination:
    """The headers in a folder or archive; its files can be read while it is open."""

    path: Path
    series: tuple[Series, ...]
    """Those of images, whatever they show."""
    objects: tuple[tuple[Path, str], ...]
    """Files without an image, with their kind."""
    unread: tuple[tuple[Path, FileProblem], ...]
    """Files that look like DICOM but can't be read, with the reason."""

    def place_of(self, file: Path) -> str:
        """Return the path of a file as the user knows it, not that of its temporary copy."""
        return f"{self.path} ({file.name})" if self.path.suffix.lower() == ARCHIVE else str(file)

    def chosen(self, modality: Modality) -> tuple[Series, list[str]]:
        """Choose the series of a modality; also returns notes on the choice. Raises InputRefused."""
        label = modality.label
        if not self.series:
            self._refuse_unread(self.unread, label)
            held = ", ".join(sorted({what for _, what in self.objects}))
            raise InputRefused(
                f"there are no DICOM images for {label}",
                where=self.path,
                found=f"{len(self.objects)} DICOM files without images: {held}" if self.objects else "no DICOM files",
                do=f"give the folder or .zip that holds the {label} series as DICOM, or an image file (.nii.gz, .mha, .nrrd)",
            )
        try:
            series, notes = choose_series(self.series, modality, self.path)
        except InputRefused:
            self._refuse_unread(self.unread, label)  # the unreadable file may be one of the series
            raise
        self._refuse_possible_slices(series, label)
        return series, [*notes, *self._wrong_elsewhere(series, label)]

    def stack(self, series: Series, label: str) -> Stack:
        """Return a series with its slices sorted. Raises InputRefused."""
        return build_stack(series, self.path, label, self.place_of)

    def read(self, modality: Modality, *, with_low_b: bool = False) -> RawImage:
        """Read the image of a modality as float32; with a DWI also that of lowest b-value, if asked for. Raises InputRefused."""
        series, notes = self.chosen(modality)
        with attach_notes(notes):
            return self._read(series, modality, notes, with_low_b=with_low_b)

    def _read(self, series: Series, modality: Modality, notes: list[str], *, with_low_b: bool) -> RawImage:
        label = modality.label
        stack = self.stack(series, label)
        self._refuse_strays(series, stack, label)
        if modality is Modality.DWI:
            stack = _least_derived(stack, notes)
        elif len(stack.volumes) > 1:
            raise InputRefused(
                f"the {label} series has several images of each slice",
                where=self.path,
                found=f"{len(stack.volumes)} images at each of {len(stack.volumes[0])} slice positions in {series.title}",
                do="give a series with one volume",
            )
        with redirect_native_stderr():
            volumes = read_pixels(stack.volumes, label, self.place_of)
            refuse_differing_copies(series.copies, label, self.place_of)
        array, made_of = volumes[0], [0]
        if modality is Modality.DWI and (len(volumes) > 1 or stack.b_values is not None):
            array, note = select_dwi(volumes, stack.b_values, self.path)
            made_of = weighted_volume_indices(len(volumes), stack.b_values)
            notes += [note] if len(volumes) > 1 else []
        low = select_low_b(volumes, stack.b_values, self.path) if with_low_b else None
        notes += [f"{label}: {note}" for note in stack.notes] + link_notes(self.path, label)
        if any(frame.instance.stored is not None and frame.instance.stored.inverted for frame in series.frames):
            notes.append(f"{label}: stored with black as the largest value (MONOCHROME1): inverted")
        grid = orthonormalize_direction(stack.grid, self.path, label, notes)
        volume = Volume(np.asarray(array, np.float32), grid)
        return RawImage(self.path, volume, tuple(notes), low, _origin([stack.volumes[number] for number in made_of]))

    def _refuse_unread(self, unread: Sequence[tuple[Path, FileProblem]], label: str) -> None:
        for file, problem in unread[:1]:
            what, where = f"a file of the {label} series {problem.what}", self.place_of(file)
            raise InputRefused(what, where=where, found=problem.found, do=problem.do)

    def _refuse_possible_slices(self, series: Series, label: str) -> None:
        """Raise InputRefused for unreadable files that may be slices of the series, by UID or by folder."""
        self._refuse_unread([(file, why) for file, why in self.unread if file.parent in series.folders], label)
        own = {frame.instance.series for frame in series.frames} - {""}
        for frame in (frame for each in self.series if each is not series for frame in each.frames):
            about = frame.instance
            unknown = about.series == "" or about.stored is None or not about.stored.is_sized
            if about.problem and (about.series in own or (unknown and about.path.parent in series.folders)):
                refuse_unreadable_frame(frame, label, self.place_of)

    def _refuse_strays(self, series: Series, stack: Stack, label: str) -> None:
        """Raise InputRefused for single images that would be the next slice of the series, and share its UID or description.

        A slice missing at an end is not to be noticed otherwise.
        """
        step, about = stack.grid.affine[:3, 2], series.frames[0].instance
        ends = np.array([stack.grid.affine[:3] @ (0, 0, at, 1) for at in (-1, stack.grid.size[2])])
        others = (each for each in self.series if each is not series and len(each.frames) < stack.grid.size[2])
        for frame in (frame for each in others for frame in each.frames if frame.plane is not None):
            assert frame.plane is not None
            own = frame.instance
            akin = own.series == about.series or (own.study, own.description) == (about.study, about.description)
            away = float(np.linalg.norm(ends - frame.plane.position, axis=1).min() / np.linalg.norm(step))
            if akin and away < _NEXT_SLICE:
                raise InputRefused(
                    f"an image lies where the next slice of the {label} series would be, but has a different header",
                    where=self.place_of(own.path),
                    found=own.other or f"'{own.description}', {' '.join(frame.image_type)}",
                    do=f"{AGAIN}, or remove the file if it is not a slice of the series",
                )

    def _wrong_elsewhere(self, chosen: Series, label: str) -> list[str]:
        """Return a note on unreadable files outside the chosen series."""
        problems = {
            each.title: f"a file {frame.instance.problem.what}"
            for each in self.series
            if each is not chosen
            for frame in each.frames
            if frame.instance.problem is not None
        }
        problems |= {file.name: f"{problem.what}: {problem.found}" for file, problem in self.unread}
        if not problems:
            return []
        return [
            f"{label}: unreadable files, none of them needed: {'; '.join(f'{name} [{why}]' for name, why in sorted(problems.items()))}"
        ]


def read_dicom(path: Path, modality: Modality, *, with_low_b: bool = False) -> RawImage:
    """Read the series of a modality from a folder (with subfolders) or .zip, as float32.

    Raises InputRefused when there is none or more than one, or when its slices are missing, surplus, mixed, damaged, or of a kind that
    is not read.
    """
    with open_examination(path, modality.label) as examination:
        return examination.read(modality, with_low_b=with_low_b)


def modalities_in(folder: Path) -> frozenset[Modality]:
    """Return the modalities of the DICOM series in a folder (with subfolders), readable or not; empty without DICOM.

    Raises InputRefused if nothing is to be found because files are damaged.
    """
    with open_examination(folder, "DICOM") as examination:
        kinds = {str(series.kind) for series in examination.series}
        shown = frozenset(modality for modality in Modality if modality.label in kinds)
        if not shown:
            examination._refuse_unread(examination.unread, "DICOM")
        return shown


@contextmanager
def open_examination(path: Path, label: str) -> Iterator[Examination]:
    """Read the headers of all files of a folder or archive, unpacked for the duration of the block. Raises InputRefused."""
    with unpacked_files(path, label) as files:
        frames: list[Frame] = []
        objects: list[tuple[Path, str]] = []
        unread: list[tuple[Path, FileProblem]] = []
        for file in files:
            try:
                header = read_header(file)
                found = [] if header is None else read_frames(file, header)
            except (NotDicom, *MALFORMED) as error:
                unread.append((file, _why_unread(file, error)))
                continue
            if found and found[0].instance.stored is None:
                objects.append((file, found[0].instance.other))
            else:
                frames += found
        yield Examination(path, tuple(group_into_series(frames)), tuple(objects), tuple(unread))


def _why_unread(file: Path, error: Exception) -> FileProblem:
    if isinstance(error, OSError):
        why = unreadable_reason(file, error)
        return FileProblem(why.what, why.found, why.do)
    found = (str(error) or type(error).__name__).splitlines()[0]
    return FileProblem("is damaged, or is not DICOM", found, f"{AGAIN}, or remove the file if it does not belong to it")


def _origin(volumes: Sequence[Sequence[Frame]]) -> DicomOrigin | None:
    """Return the source of each slice of an image made from these volumes; None if the files can no longer be read."""
    first = volumes[0][0]
    plane = plane_of(first)
    try:
        study = read_study_attributes(first.instance.path)
    except MALFORMED:
        return None
    slices = tuple(
        SourceSlice(plane_of(held[0]).position, tuple(_source(frame) for frame in held))
        for held in zip(*volumes, strict=True)
    )
    return DicomOrigin(study, plane.orientation, plane.spacing, slices)


def _source(frame: Frame) -> SourceFrame:
    about = frame.instance
    several = about.stored is not None and about.stored.frames > 1
    return SourceFrame(about.sop_class, about.sop_instance, about.series, frame.index + 1 if several else None)


def _least_derived(stack: Stack, notes: list[str]) -> Stack:
    """Return a DWI without derived volumes (means over directions, maps) of shells for which acquired ones exist."""
    if stack.b_values is None:
        return stack
    shells = list(zip(stack.b_values, stack.made, strict=True))
    surplus = [
        n
        for n, (b, made) in enumerate(shells)
        if any(other < made and abs(b - at) <= SAME_SHELL for at, other in shells)
    ]
    if surplus:
        what = "mean over directions" if {stack.made[n] for n in surplus} == {2} else "derived images"
        notes.append(
            f"DWI: the scanner's own {what} ({len(surplus)} volumes) not used, because the single directions are available"
        )
    return stack.without(surplus)
