"""Small DICOM series, written with GDCM as scanners lay them out: one file a slice, tags of place, series and diffusion."""

from __future__ import annotations

import locale
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.types import AnyArray
from ensemble.volume import Volume

CT_STORAGE, MR_STORAGE = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"


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
    extra: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a volume, one file a slice, with values rounded to 16 bits, in steps of `slope`; returns the files, bottom first.

    `first` is the first instance number; a series of several b-values is written by several calls with one `uid`.
    """
    before = locale.setlocale(locale.LC_ALL)
    folder.mkdir(parents=True, exist_ok=True)
    grid, files = volume.grid, []
    columns = np.reshape(grid.direction, (3, 3))
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    for z, plane in enumerate(volume.array):
        steps = np.round(np.asarray(plane, np.float64) / (slope or 1.0)) * (slope or 1.0)  # GDCM divides by the slope
        image = sitk.GetImageFromArray(steps.astype(np.int16)[None])
        image.SetSpacing(grid.spacing_mm)
        place = grid.affine[:3] @ (0, 0, z, 1)
        tags = {
            "0008|0016": MR_STORAGE,
            "0008|0018": f"1.2.3.{uid}.{first + z}",
            "0020|000d": "1.2.3",
            "0020|000e": f"1.2.3.{uid}",
            "0008|0060": "MR",
            "0008|0008": image_type,
            "0008|103e": description,
            "0020|0013": str(first + z),
            "0020|0032": "\\".join(f"{mm:.6f}" for mm in place),
            "0020|0037": "\\".join(f"{cosine:.8f}" for cosine in columns.T[:2].ravel()),
            "0018|0050": f"{grid.spacing_mm[2]:g}",
        }
        if b is not None:
            tags["0018|9087"] = f"{b:g}"
        if slope is not None:
            # GDCM writes MR images with a slope as enhanced ones; those of CT may have one in the ordinary form
            tags |= {"0008|0016": CT_STORAGE, "0008|0060": "CT", "0028|1053": f"{slope:g}", "0028|1052": "0"}
        for key, value in (tags | dict(extra or {})).items():
            image.SetMetaData(key, value)
        path = folder / f"{uid}_{first + z:04d}.dcm"
        writer.SetFileName(str(path))
        writer.Execute(image)
        files.append(path)
    locale.setlocale(locale.LC_ALL, before)  # GDCM leaves it at C after writing (not after reading)
    return files


def whole(array: AnyArray) -> AnyArray:
    """An array as 16-bit DICOM keeps it."""
    return np.round(array).astype(np.float32)
