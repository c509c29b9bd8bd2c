"""`DraftCase`, a case during preparation; `Step`, the signature of every preparation step; `Note`, what a step records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ensemble.config import Registration, RunConfig, SkullStrip
from ensemble.types import BoolArray, Modality
from ensemble.volume import Volume

#: Makes an image that only some members want.
LazyVolume = Callable[[], Volume]


class LazyImages(Mapping[Modality, Volume]):
    """Images of which some are computed when first accessed, and then kept."""

    def __init__(self, images: Mapping[Modality, Volume | LazyVolume]) -> None:
        self._images = dict(images)

    def __getitem__(self, modality: Modality) -> Volume:
        image = self._images[modality]
        if not isinstance(image, Volume):
            image = self._images[modality] = image()
        return image

    def __iter__(self) -> Iterator[Modality]:
        return iter(self._images)

    def __len__(self) -> int:
        return len(self._images)


def _nowhere() -> BoolArray:
    return np.zeros((0, 0, 0), bool)


@dataclass(frozen=True)
class Note:
    """A repair, or a remark on something unusual."""

    text: str
    """One sentence."""
    image: Modality | None = None
    """The image concerned; None for the case as a whole."""
    step: str = ""
    """The step that noted it: a function of `case.STEPS`, or "readers"."""


@dataclass(frozen=True)
class UnusableVoxels:
    """Voxels of an image that are not finite or impossibly bright. They are set to 0 until a later step decides about them."""

    where: Volume
    """bool, on the image's own grid."""
    hot: int
    """How many voxels are impossibly bright."""


@dataclass(frozen=True)
class DraftCase:
    """A case between two steps of preparation."""

    name: str
    paths: Mapping[Modality, Path]
    """Of the images' files, for messages."""
    images: Mapping[Modality, Volume]
    """float32, as read; each on its own grid until a step brings it onto that of DWI."""
    skull_strip: SkullStrip = "auto"
    device: str = "cpu"
    """Where HD-BET runs if it must."""
    brain_ml: tuple[float, float] = RunConfig.brain_ml
    """Volume that a brain may have."""
    registration: Registration = "auto"
    """Whether FLAIR is registered."""
    flair_is_needed: bool = True
    """Whether any member or output uses FLAIR; otherwise it need not be registered."""
    unusable: Mapping[Modality, UnusableVoxels] = field(default_factory=dict)
    """For each image that had such values."""
    covered: BoolArray = field(default_factory=_nowhere)
    """Where ADC has data, on the DWI grid; empty until it is resampled to that grid."""
    brain: BoolArray = field(default_factory=_nowhere)
    """On the DWI grid; of no size until it is found."""
    stripped: bool = False
    """Whether a skull was stripped."""
    rough_edge: bool = False
    """Whether the edge of the brain is only roughly known, and skull may lie within it."""
    as_read: Mapping[Modality, Volume | LazyVolume] = field(default_factory=dict)
    """The images before a noisy background was cleared; without skull where one was stripped. Until then at most FLAIR (see `flair`)."""
    tissue_normalized: Mapping[Modality, Volume] = field(default_factory=dict)
    """float32, normalised by tissue."""

    @property
    def dwi(self) -> Volume:
        """The image to whose grid all others are resampled."""
        return self.images[Modality.DWI]

    @property
    def adc(self) -> Volume:
        """The ADC map."""
        return self.images[Modality.ADC]

    def with_image(self, modality: Modality, volume: Volume) -> DraftCase:
        """Return the case with an image replaced."""
        return replace(self, images={**self.images, modality: volume})


StepResult = tuple[DraftCase, tuple[Note, ...]]
#: A step takes a draft and returns the next one with notes. Raises InputRefused if the case can't be segmented safely.
Step = Callable[[DraftCase], StepResult]
