"""A data set as nnU-Net v2 wants it raw: `DatasetXXX_Name/{imagesTr,labelsTr,dataset.json}`."""

from __future__ import annotations

import re
from pathlib import Path

import SimpleITK as sitk

from ensemble.errors import UsageError
from ensemble.prepare.case import PreparedCase
from ensemble.publish import write_json
from ensemble.types import AnyArray, Modality
from ensemble.volume import Volume, to_sitk

_NAME = re.compile(r"Dataset\d{3}_[A-Za-z0-9_-]+")
#: Every case has these; FLAIR joins if all have it.
_ALWAYS = (Modality.DWI, Modality.ADC)


class NnunetRaw:
    """A folder that is filled case by case. Images are as members with native intensities get them: on the DWI grid, without skull."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError for a name that nnU-Net would not find, or a folder that holds something."""
        if not _NAME.fullmatch(folder.absolute().name):
            raise UsageError("nnU-Net finds data sets by their names", where=folder, do="call it Dataset123_Name")
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError("nnU-Net's folder is not empty", where=folder, do="name a new folder as --nnunet-raw")
        self.folder = folder
        self.cases: list[str] = []
        self.without_flair: list[str] = []
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def add(self, name: str, case: PreparedCase, lesion: AnyArray) -> None:
        """One case: DWI `_0000`, ADC `_0001`, FLAIR `_0002`, and its mask."""
        for channel, modality in enumerate((*_ALWAYS, Modality.FLAIR)):
            if modality in case.images:
                _write(case.images[modality], self.folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz")
        _write(case.brain.like(lesion), self.folder / "labelsTr" / f"{name}.nii.gz")
        self.cases.append(name)
        if Modality.FLAIR not in case.images:
            self.without_flair.append(name)

    def finish(self) -> None:
        """Write dataset.json. nnU-Net wants the same channels of every case: FLAIR is left out where one has none."""
        channels = [modality.label for modality in _ALWAYS]
        if self.without_flair:
            for path in (self.folder / "imagesTr").glob("*_0002.nii.gz"):
                path.unlink()
        else:
            channels.append(Modality.FLAIR.label)
        description = {
            "channel_names": {str(number): name for number, name in enumerate(channels)},
            "labels": {"background": 0, "lesion": 1},
            "numTraining": len(self.cases),
            "file_ending": ".nii.gz",
        }
        write_json(description, self.folder / "dataset.json")


def _write(volume: Volume, path: Path) -> None:
    sitk.WriteImage(to_sitk(volume), str(path))
