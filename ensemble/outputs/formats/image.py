"""Write volumes as image files of any format that SimpleITK writes, chosen by the file name's suffix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from ensemble.logging_setup import redirect_native_stderr
from ensemble.volume import Volume, from_sitk, to_sitk

#: Formats keep geometry in few digits; more than this is another place.
MAX_ROUNDING_VOXELS = 0.01


def write(volume: Volume, path: Path) -> None:
    """Write a volume, compressed, with only geometry in its header; then read it back, as a full disk may go unnoticed.

    Raises OSError when the file does not hold what was written, ValueError when its format can't hold the volume's geometry.
    """
    image = to_sitk(volume)
    try:
        with redirect_native_stderr():
            sitk.WriteImage(image, str(path), useCompression=True)
            back = from_sitk(sitk.ReadImage(str(path)))
    except RuntimeError as error:
        raise OSError(f"{path.name} could not be written: {str(error).splitlines()[-1].strip()}") from error
    if not np.array_equal(back.array, sitk.GetArrayViewFromImage(image), equal_nan=True):
        raise OSError(f"{path.name} does not read back as it was written: is the disk full?")
    if not volume.grid.distance_voxels(back.grid) < MAX_ROUNDING_VOXELS:
        raise ValueError(f"{path.suffix} can't hold this geometry: {volume.grid}")
