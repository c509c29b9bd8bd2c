"""Warm-up: run a synthetic phantom through every member, so that one-time initialisation happens before the first case."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

import numpy as np

from ensemble.geometry import Grid
from ensemble.logging_setup import suppress_info_messages
from ensemble.pipeline import Ensemble, segment_raw
from ensemble.readers.base import RawCase, RawImage
from ensemble.types import Modality
from ensemble.volume import Volume

log = logging.getLogger(__name__)

#: Warm-up ends after this long, before grand-challenge's 300 s are over: large networks on a CPU may take minutes for one window.
WARM_UP_LIMIT_S = 60.0
#: Small enough to lie in one window of any usual network, so that each is run once.
_GRID = Grid(
    size=(24, 24, 12), spacing_mm=(4.0, 4.0, 5.0), origin_mm=(0.0, 0.0, 0.0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)
)
#: Values of normal tissue and lesion, in the units of scanners (ADC: 1e-6 mm^2/s).
_TISSUE = {Modality.DWI: (300.0, 700.0), Modality.ADC: (800.0, 400.0), Modality.FLAIR: (200.0, 350.0)}


def warm_up(ensemble: Ensemble) -> None:
    """Segment a phantom with every member, without mirroring. Failures are only logged, because real cases may still work."""
    hurried = dataclasses.replace(
        ensemble,
        # the phantom has no skull, so that HD-BET would find no brain in it, and it is small
        config=dataclasses.replace(ensemble.config, skull_strip="never", brain_ml=(0.0, 1000.0)),
        settings=dataclasses.replace(ensemble.settings, tta="none"),
    )
    try:
        with suppress_info_messages():  # notes on the phantom would appear in the log of the first patient
            segment_raw(_phantom(), hurried, _Deadline(time.monotonic() + WARM_UP_LIMIT_S))
    except _Enough:
        log.info("warm-up stopped after %.0f s", WARM_UP_LIMIT_S)
    except Exception as error:
        log.warning("warm-up failed: %s", error)


class _Enough(BaseException):
    """Ends the warm-up. Not an Exception, so that it does not count as a member's failure."""


class _Deadline:
    """A watcher that stops a case at a time limit."""

    def __init__(self, end: float) -> None:
        self._end = end

    def stage(self, name: str) -> None:
        if time.monotonic() > self._end:
            raise _Enough

    def windows(self, done: int, total: int) -> None:
        self.stage("")


def _phantom() -> RawCase:
    """Return an ellipsoid of tissue with a lesion."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in _GRID.shape_zyx], indexing="ij")
    head = (x / 0.85) ** 2 + (y / 0.9) ** 2 + (z / 0.9) ** 2 < 1
    lesion = (x - 0.4) ** 2 + (y + 0.2) ** 2 + (z - 0.1) ** 2 < 0.05
    noise = np.random.default_rng(0).normal(1.0, 0.02, _GRID.shape_zyx)
    images = {}
    for modality, (normal, ischemic) in _TISSUE.items():
        array = (head * noise * np.where(lesion, ischemic, normal)).astype(np.float32)
        images[modality] = RawImage(Path(f"phantom-{modality}"), Volume(array, _GRID))
    return RawCase("phantom", images)
