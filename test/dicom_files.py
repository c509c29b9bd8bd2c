"""Small DICOM series, written with pydicom as scanners lay them out: classic, Enhanced, Siemens mosaic, United Imaging's tiles."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian

from ensemble.types import AnyArray
from ensemble.volume import Volume

MR, ENHANCED_MR, LEGACY_MR = (f"1.2.840.10008.5.1.4.1.1.4{end}" for end in ("", ".1", ".4"))
Weighted = tuple[float | None, Volume]


def write_series(
    volume: Volume,
    folder: Path,
    *,
    description: str = "",
    uid: str = "1",
    b: float | None = None,
    first: int = 1,
    image_type: str = "ORIGINAL\\PRIMARY",
    slope: float | None = None,
    extra: Mapping[str, object] | None = None,
    change: Callable[[Dataset, int], object] = lambda dataset, z: None,
) -> list[Path]:
    """Write a volume, one file a slice, with values rounded to 16 bits, in steps of `slope`; returns the files, bottom first.

    `first` is the first instance number; a series of several b-values is written by several calls with one `uid`. `extra` are elements
    by keyword; `change` gets each data set, and its slice's number, before it is written.
    """
    files = []
    for z, plane in enumerate(volume.array):
        dataset = _common(description, uid, first + z, image_type)
        _place(dataset, dataset, dataset, volume, z)
        if b is not None:
            dataset.DiffusionBValue = float(b)
        if slope is not None:
            dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:g}", "0"
        _set_pixels(dataset, np.round(np.asarray(plane, np.float64) / (slope or 1.0)).astype(np.int16))
        for keyword, value in (extra or {}).items():
            setattr(dataset, keyword, value)
        change(dataset, z)
        files.append(save(dataset, folder / f"{uid}_{first + z:04d}.dcm"))
    return files


def write_enhanced(
    volumes: Sequence[Weighted],
    path: Path,
    *,
    description: str = "",
    uid: str = "1",
    number: int = 1,
    sop_class: str = ENHANCED_MR,
    image_type: str = "ORIGINAL\\PRIMARY\\DIFFUSION\\NONE",
    shared: bool = True,
    slope: float = 1.0,
    change: Callable[[Dataset], object] = lambda dataset: None,
) -> Path:
    """Write volumes, each with its b-value, into one multi-frame file; `shared`: what holds for all frames stands in the shared group."""
    dataset = _common(description, uid, number, image_type)
    dataset.SOPClassUID = sop_class
    common, frames, planes = Dataset(), [], []
    for t, (b, volume) in enumerate(volumes):
        for z, plane in enumerate(volume.array):
            frame = Dataset()
            holder = common if shared else frame
            position, oriented, measured = Dataset(), Dataset(), Dataset()
            _place(position, oriented, measured, volume, z)
            frame.PlanePositionSequence = Items([position])
            holder.PlaneOrientationSequence, holder.PixelMeasuresSequence = Items([oriented]), Items([measured])
            rescale, kind, content = Dataset(), Dataset(), Dataset()
            rescale.RescaleSlope, rescale.RescaleIntercept = f"{slope:g}", "0"
            holder.PixelValueTransformationSequence = Items([rescale])
            kind.FrameType = image_type.split("\\")
            frame.MRImageFrameTypeSequence = Items([kind])
            content.TemporalPositionIndex, content.InStackPositionNumber = t + 1, z + 1
            frame.FrameContentSequence = Items([content])
            diffusion = Dataset()
            if b is not None:
                diffusion.DiffusionDirectionality = "DIRECTIONAL" if b else "NONE"
                diffusion.DiffusionBValue = float(b)
                frame.MRDiffusionSequence = Items([diffusion])
            frames.append(frame)
            planes.append(np.round(plane / slope).astype(np.int16))
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = Items([common]), Items(frames)
    dataset.NumberOfFrames = len(frames)
    _set_pixels(dataset, np.stack(planes))
    change(dataset)
    return save(dataset, path)


def write_mosaic(
    volume: Volume,
    path: Path,
    *,
    description: str = "",
    uid: str = "1",
    number: int = 1,
    b: float | None = None,
    image_type: str = "ORIGINAL\\PRIMARY\\DIFFUSION\\NONE\\ND\\MOSAIC",
    csa: bool = True,
    downwards: bool = False,
) -> Path:
    """Write a volume as a Siemens mosaic; `downwards`: its slices from the last to the first, as of sagittal ones."""
    dataset = _common(description, uid, number, image_type)
    dataset.Manufacturer = "SIEMENS"
    if downwards:
        volume = _upside_down(volume)
    grid, (slices, rows, columns) = volume.grid, volume.array.shape
    side = math.ceil(math.sqrt(slices))
    _place(dataset, dataset, dataset, volume, 0)
    across, down, normal = np.reshape(grid.direction, (3, 3)).T
    wider, taller = (side - 1) * columns / 2 * grid.spacing_mm[0], (side - 1) * rows / 2 * grid.spacing_mm[1]
    corner = np.array(grid.origin_mm) - across * wider - down * taller
    dataset.ImagePositionPatient = [f"{mm:.9g}" for mm in corner]
    dataset.SpacingBetweenSlices = f"{grid.spacing_mm[2]:g}"
    mosaic = np.zeros((side * rows, side * columns), np.int16)
    for k, plane in enumerate(volume.array):
        row, column = k // side * rows, k % side * columns
        mosaic[row : row + rows, column : column + columns] = np.round(plane)
    _set_pixels(dataset, mosaic)
    if csa:
        words = {"NumberOfImagesInMosaic": [str(slices)], "SliceNormalVector": [f"{cosine:.8f}" for cosine in normal]}
        dataset.private_block(0x29, "SIEMENS CSA HEADER", create=True).add_new(0x10, "OB", csa_header(words))
    if b is not None:
        dataset.private_block(0x19, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", f"{b:g}")
    return save(dataset, path)


def write_tiles(
    volume: Volume, path: Path, *, description: str = "", uid: str = "1", number: int = 1, b: float | None = None
) -> Path:
    """Write a volume as United Imaging's VFRAME: tiles that each have a place."""
    dataset = _common(description, uid, number, "ORIGINAL\\PRIMARY\\M\\VFRAME")
    dataset.Manufacturer = "UIH"
    slices, rows, columns = volume.array.shape
    across = math.ceil(math.sqrt(slices))
    tiled = np.zeros((math.ceil(slices / across) * rows, across * columns), np.int16)
    block = dataset.private_block(0x65, "Image Private Header", create=True)
    items = []
    for k, plane in enumerate(volume.array):
        row, column = k // across * rows, k % across * columns
        tiled[row : row + rows, column : column + columns] = np.round(plane)
        items.append(Dataset())
        _place(items[-1], dataset, dataset, volume, k)
    block.add_new(0x50, "DS", str(slices))
    block.add_new(0x51, "SQ", Items(items))
    if b is not None:
        block.add_new(0x09, "FD", float(b))
    _set_pixels(dataset, tiled)
    return save(dataset, path)


def csa_header(tags: Mapping[str, Sequence[str]]) -> bytes:
    """A Siemens CSA2 header that holds some numbers."""
    content = b"SV10\x04\x03\x02\x01" + struct.pack("<2I", len(tags), 77)
    for name, items in tags.items():
        content += struct.pack("<64si4s3i", name.encode(), len(items), b"FD", 4, len(items), 77)
        for item in items:
            text = item.encode() + b"\0"
            content += struct.pack("<4i", len(text), len(text), 77, len(text)) + text + b"\0" * (-len(text) % 4)
    return content


def edited(path: Path, change: Callable[[Dataset], object]) -> Path:
    """Write a file again, changed."""
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path, enforce_file_format=True)
    return path


def save(dataset: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        dataset.SOPClassUID,
        dataset.get("SOPInstanceUID", "1.2.3"),
    )
    dataset.file_meta = meta
    dataset.save_as(path, enforce_file_format=True)
    return path


def whole(array: AnyArray) -> AnyArray:
    """An array as 16-bit DICOM keeps it."""
    return np.round(array).astype(np.float32)


def _common(description: str, uid: str, number: int, image_type: str) -> Dataset:
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = MR, f"1.2.3.{uid}.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", f"1.2.3.{uid}"
    dataset.Modality, dataset.ImageType = "MR", image_type.split("\\")
    dataset.SeriesDescription, dataset.InstanceNumber = description, number
    return dataset


def _place(positioned: Dataset, oriented: Dataset, measured: Dataset, volume: Volume, z: int) -> None:
    grid = volume.grid
    positioned.ImagePositionPatient = [f"{mm:.9g}" for mm in grid.affine[:3] @ (0, 0, z, 1)]
    oriented.ImageOrientationPatient = [f"{cosine:.8f}" for cosine in np.reshape(grid.direction, (3, 3)).T[:2].ravel()]
    measured.PixelSpacing = [f"{grid.spacing_mm[1]:g}", f"{grid.spacing_mm[0]:g}"]
    measured.SliceThickness = f"{grid.spacing_mm[2]:g}"


def _set_pixels(dataset: Dataset, array: AnyArray) -> None:
    dataset.Rows, dataset.Columns = array.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = array.itemsize * 8
    dataset.HighBit, dataset.PixelRepresentation = array.itemsize * 8 - 1, int(array.dtype.kind == "i")
    dataset.PixelData = array.tobytes()


def _upside_down(volume: Volume) -> Volume:
    from dataclasses import replace

    grid = volume.grid
    last = grid.affine[:3] @ (0, 0, grid.size[2] - 1, 1)
    direction = np.reshape(grid.direction, (3, 3)) * (1, 1, -1)
    moved = replace(grid, origin_mm=tuple(last.tolist()), direction=tuple(direction.ravel().tolist()))
    return Volume(volume.array[::-1], moved)
