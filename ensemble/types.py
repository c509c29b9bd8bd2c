"""Types shared by every layer: modalities and arrays."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

AnyArray = NDArray[Any]
FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]

#: Called with (windows done, windows in all) while a network runs.
ProgressCallback = Callable[[int, int], None]


class Modality(StrEnum):
    """The images of one case."""

    DWI = "dwi"
    ADC = "adc"
    FLAIR = "flair"

    @property
    def label(self) -> str:
        """The usual spelling: DWI, ADC, FLAIR."""
        return self.value.upper()


def ignore_progress(done: int, total: int) -> None:
    """Do nothing: a progress callback for callers without one."""
