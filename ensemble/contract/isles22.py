"""The ISLES'22 algorithm interface on grand-challenge: the paths of its inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ensemble.errors import InputRefused
from ensemble.files import error_in_words, is_permission_error, lexists, read_json, unreadable_reason
from ensemble.outputs.layouts.contract import OUTPUT_SLUG
from ensemble.readers.dicom.files import has_dicom_signature
from ensemble.readers.names import ARCHIVE, IMAGE_SUFFIXES, SLICE_SUFFIXES, image_suffix, stem
from ensemble.readers.sources import Stamp, image_stamps, may_have_b_values
from ensemble.types import Modality

#: Interface slug of each input image; its folder is /input/images/<slug>.
INPUT_SLUGS = {
    Modality.DWI: "dwi-brain-mri",
    Modality.ADC: "adc-brain-mri",
    Modality.FLAIR: "flair-brain-mri",
}


@dataclass(frozen=True)
class ContractCase:
    """The input files of one run, and the names that its outputs must have."""

    files: dict[Modality, Path]
    stamps: dict[Path, Stamp | None]
    """Of each file of the images, when they were found."""

    def refuse_if_changed(self) -> None:
        """Raise InputRefused if a file changed since it was found.

        If inputs are replaced while a case runs, its outputs could be mistaken for those of the next case.
        """
        now = image_stamps(self.files.values())
        for path in self.stamps | now:
            if now.get(path) != self.stamps.get(path):
                raise InputRefused(
                    f"an input file {'has changed' if now.get(path) else 'was removed'} while the case was being segmented",
                    where=path,
                    do="do not change the inputs until the outputs have been written",
                )

    @property
    def name(self) -> str:
        """The case's name in logs and reports: the DWI's file name without its suffix."""
        return stem(self.files[Modality.DWI])

    @property
    def mask_name(self) -> str:
        """File name of the mask: the DWI's, always ending in .mha."""
        return self.name + ".mha"

    @property
    def results(self) -> list[dict[str, list[dict[str, str]]]]:
        """Content of `results.json`."""
        return [
            {
                "outputs": [{"type": "Image", "slug": OUTPUT_SLUG, "filename": self.mask_name}],
                "inputs": [
                    {"type": "Image", "slug": INPUT_SLUGS[Modality.DWI], "filename": self.files[Modality.DWI].name}
                ],
            }
        ]


def find_inputs(root: Path) -> ContractCase:
    """Find the images of the single case below the input root.

    `inputs.json` is optional; if it exists, every image that it lists must exist. The acquisition parameter files carry
    nothing that the segmentation uses and may be missing. Raises InputRefused.
    """
    try:
        files = _find_images(root)
        return ContractCase(files, image_stamps(files.values()))
    except OSError as error:
        where = Path(error.filename or root)
        why = unreadable_reason(where, error)
        rights = "give this user permission to read it (chmod -R a+rX), or run the container as its owner (--user)"
        raise InputRefused(
            "the input folder can't be read",
            where=where,
            found=why.said,
            do=rights if is_permission_error(error) else why.do,
        ) from error


def _find_images(root: Path) -> dict[Modality, Path]:
    if not root.is_dir():
        raise InputRefused(
            "the input folder does not exist", where=root, do="mount the case there, or name another with --input"
        )
    listed = _listed_folders(root / "inputs.json")
    files: dict[Modality, Path] = {}
    for modality, slug in INPUT_SLUGS.items():
        folder = root / listed.get(slug, Path("images") / slug)
        # whether it can be computed is reported when the DWI is read
        computed = modality is Modality.ADC and may_have_b_values(files[Modality.DWI])
        must_exist = slug in listed or not (modality is Modality.FLAIR or computed)
        if (image := _only_image(folder, modality, must_exist)) is not None:
            files[modality] = image
    return files


def _only_image(folder: Path, modality: Modality, must_exist: bool) -> Path | None:
    """Return the only image file in a folder; None if there is none and none is required."""
    label = modality.label
    present = sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    # dangling links and other non-files, too: reading them reports the error
    images = [path for path in present if not path.is_dir() and (image_suffix(path) or path.suffix.lower() == ARCHIVE)]
    if not images and any(
        path.is_dir()
        or path.suffix.lower() in SLICE_SUFFIXES
        or not path.exists()
        or (path.is_file() and has_dicom_signature(path))
        for path in present
    ):
        return folder  # of DICOM files, or of such folders
    if len(images) == 1:
        return images[0]
    if images:
        raise InputRefused(
            f"there is more than one {label} image",
            where=folder,
            found=", ".join(path.name for path in images),
            do="keep exactly one",
        )
    if present or must_exist:
        raise InputRefused(
            f"there is no {label} image",
            where=folder,
            found=", ".join(path.name for path in present)
            or ("an empty folder" if folder.is_dir() else "no such folder"),
            do=f"put one {label} image there ({', '.join(IMAGE_SUFFIXES)}), or DICOM files or a .zip of them",
        )
    return None


def _listed_folders(inputs_json: Path) -> dict[str, Path]:
    """Return the folder of each image socket in `inputs.json`, relative to the input root; empty if the file does not exist.

    Entries name their socket as `interface` (until mid-2025), `socket` (since), or both.
    """
    if not lexists(inputs_json):
        return {}
    try:
        entries = read_json(inputs_json)
        sockets = [entry.get("socket") or entry["interface"] for entry in entries]
        return {
            socket["slug"]: _inside(Path(socket["relative_path"]))
            for socket in sockets
            if socket["slug"] in INPUT_SLUGS.values()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputRefused(
            "inputs.json is not valid",
            where=inputs_json,
            found=error_in_words(error),
            do="restore the file that grand-challenge writes, or remove it",
        ) from error


def _inside(relative: Path) -> Path:
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"relative_path {str(relative)!r} leaves the input folder")
    return relative
