"""Recognise the image and case of a file by its path. This is the only module that knows how datasets are laid out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ensemble.batch.channels import ChannelNames
from ensemble.contract.isles22 import INPUT_SLUGS
from ensemble.errors import InputRefused
from ensemble.readers.b_values import DIFFUSION_B, missing_adc_error
from ensemble.readers.names import ARCHIVE, ParsedName, image_suffix, parse_image_name, stem
from ensemble.readers.sources import may_have_b_values
from ensemble.types import Modality

_BIDS = re.compile(r"^sub-(?P<subject>[A-Za-z0-9]+)(?:_ses-(?P<session>[A-Za-z0-9]+))?(?=_|$)")
_RUN = re.compile(r"_run-(\d+)(?=_|$)")
#: Folders that name the kind of image, not the subject.
_KINDS = {"anat", "dwi", "adc", "flair"}
_SLUGS = {slug: modality for modality, slug in INPUT_SLUGS.items()}


@dataclass(frozen=True)
class FoundCase:
    """A case of a dataset, before any of its files is read."""

    name: str
    """Its name in the dataset; unique there."""
    files: Mapping[Modality, Path] = field(default_factory=dict)
    problem: InputRefused | None = None
    """The reason why the case can't be segmented, if already known."""
    notes: Mapping[Modality, str] = field(default_factory=dict)
    """For images chosen from several: the reason."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Cells of requested further columns of its worklist."""
    listed: str = ""
    """When it was found, if that was in an earlier search (`case_list`): its files may have gone since."""


@dataclass(frozen=True)
class FoundImage:
    """An image file and what its path states about it."""

    path: Path
    modality: Modality
    group: tuple[str, ...]
    """Images of one group belong to one case, unless a modality comes up twice."""
    prefix: str = ""
    """The case name in the file's name, for groups with several cases."""
    labels: tuple[str, ...] = ()
    """The BIDS labels of its case, if its name has any."""
    holder: tuple[str, ...] = ()
    """The parent of its subject's folder, for datasets with several (such as sites)."""
    at_odds: bool = False
    """Whether the labels of its folders contradict its name."""
    b: float | None = None
    """The b-value of a DWI (s/mm^2) in its name; this and the next fields are for choosing among several images."""
    trace: bool = False
    """Whether a DWI is named as a mean over directions."""
    derived: bool = False
    """Whether it was processed after acquisition."""

    @property
    def run(self) -> int | None:
        """The run number in its name (BIDS: `run-2`); None without one."""
        found = _RUN.search(self.path.name)
        return int(found[1]) if found else None

    @property
    def without_run(self) -> str:
        """The file's name without its run entity."""
        return _RUN.sub("", self.path.name)


def classify_path(path: Path, root: Path, channels: ChannelNames) -> FoundImage | None:
    """Return the image that a file holds, by its path; None if it is not an image of a case.

    A path that is not an image file is treated as a folder or archive of DICOM. Raises InputRefused as `ChannelNames` does.
    """
    folders, name = (
        path.relative_to(root).parent.parts,
        stem(path) if image_suffix(path) else name_without_archive_suffix(path),
    )
    one_file = image_suffix(path) or path.suffix.lower() == ARCHIVE
    if name in _SLUGS and folders[-1:] == ("images",) and not one_file:
        return FoundImage(path, _SLUGS[name], folders[:-1])
    if len(folders) >= 2 and folders[-2] == "images" and folders[-1] in _SLUGS and one_file:
        return FoundImage(path, _SLUGS[folders[-1]], folders[:-2])
    if numbered := channels.named(path):
        own = folders if folders[-1:] == (numbered.case,) else (*folders, numbered.case)
        return _labelled(path, numbered, folders) or FoundImage(path, numbered.modality, own)
    named = _named(name)
    if named is None:
        return None
    # a folder with the name of a modality does not name the subject
    at = folders[:-1] if folders and folders[-1].lower() == named.modality else folders
    image = _labelled(path, named, folders) or FoundImage(path, named.modality, at, named.case)
    return replace(image, b=named.b, trace=named.trace, derived=named.derived)


def _named(name: str) -> ParsedName | None:
    """Return what a name says; None if it names a b-value too low to show lesions."""
    named = parse_image_name(name)
    weighted = named is None or named.b is None or DIFFUSION_B[0] <= named.b <= DIFFUSION_B[1]
    return named if weighted else None


def _labelled(path: Path, named: ParsedName, folders: tuple[str, ...]) -> FoundImage | None:
    """Return the image of a name that begins with BIDS labels; None for other names."""
    name, own = named.case, _BIDS.match(named.case)
    if own is None:
        return None
    subjects = [number for number, folder in enumerate(folders) if _BIDS.match(folder)]
    if subjects:
        holder, inner, prefix = folders[: subjects[-1]], folders[subjects[-1] :], ""
    else:
        about = [folder.lower() in _KINDS or folder.startswith("ses-") for folder in folders]
        at = max((number for number, only in enumerate(about, start=1) if not only), default=0)
        # without a folder of its own, a subject is told by its whole name but what BIDS knows ("run-1")
        rest = [part for part in name[own.end() :].split("_") if part and "-" not in part]
        holder, inner, prefix = folders[:at], ("sub-" + own["subject"], *folders[at:]), "_".join(rest)
    outer = _BIDS.match(inner[0])
    assert outer is not None
    sessions = [folder[4:] for folder in inner[1:] if folder.startswith("ses-")]
    said = [session for session in (outer["session"], *sessions, own["session"]) if session]
    labels = ("sub-" + outer["subject"], *("ses-" + session for session in said[:1]))
    group = (*holder, inner[0], *(() if outer["session"] else labels[1:]))
    at_odds = len(set(said)) > 1 or own["subject"] != outer["subject"]
    return FoundImage(path, named.modality, group, prefix, labels, holder, at_odds)


def modality_of_dicom_name(path: Path) -> Modality | None:
    """Return the modality in the name of a DICOM folder or archive (also in the folder names of the contract); None for other names."""
    named = _named(name_without_archive_suffix(path))
    return _SLUGS.get(path.name) or (named.modality if named else None)


def name_without_archive_suffix(path: Path) -> str:
    """Return the name of a folder, or of an archive without its suffix."""
    return path.stem if path.suffix.lower() == ARCHIVE else path.name


def missing_image_error(files: Mapping[Modality, Path], where: Path) -> InputRefused | None:
    """Return the error for a case that lacks DWI, or lacks ADC where none can be computed; None for a complete case."""
    if Modality.DWI in files:
        known = Modality.ADC in files or may_have_b_values(files[Modality.DWI])
        return None if known else missing_adc_error(files[Modality.DWI], "its b-values are not known")
    return InputRefused(
        "there is no DWI image",
        where=where,
        found=", ".join(str(path.name) for path in files.values()),
        do="give a DWI and its ADC map, or a DWI that also contains b0, with its b-values",
    )
