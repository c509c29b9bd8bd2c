"""Segment cases from Python. `ensemble/__init__.py` lists the stable names; docs/api.md shows their use.

Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ensemble.config import Device, FusionMethod, Precision, Registration, RunConfig, SessionKind, SkullStrip, Tta
from ensemble.errors import UsageError

if TYPE_CHECKING:
    from ensemble.pipeline import Ensemble, Result, Watcher
    from ensemble.readers.base import RawCase
    from ensemble.readers.memory import ImageLike


class Options(TypedDict, total=False):
    """The options of `load_ensemble`. `RunConfig` documents each and its default."""

    members: Sequence[str] | None
    device: Device
    tta: Tta
    precision: Precision
    session: SessionKind
    fusion: FusionMethod
    min_disputed_ml: float | None
    member_weights: Mapping[str, float] | None
    min_lesion_ml: float | None
    min_members: int | None
    skull_strip: SkullStrip
    registration: Registration
    brain_ml: tuple[float, float]
    trust: bool
    allow_torchscript: bool


def read_case(
    dwi: ImageLike, adc: ImageLike | None = None, flair: ImageLike | None = None, *, name: str | None = None
) -> RawCase:
    """Read the images of one case.

    Each image is a path (an image file, or a folder or .zip of DICOM), a `Volume`, a nibabel image or a SimpleITK image. Without `adc`, an
    ADC map is computed if the DWI's file or series also contains b0 and its b-values. `name` is the case's name in reports.

    Raises InputRefused when an image can't be read safely, UsageError when it has another type.
    """
    from ensemble.readers.memory import read_images
    from ensemble.types import Modality

    given = {Modality.DWI: dwi, Modality.ADC: adc, Modality.FLAIR: flair}
    return read_images({modality: image for modality, image in given.items() if image is not None}, name)


def load_ensemble(weights: str | Path | None = None, **options: Unpack[Options]) -> Ensemble:
    """Load the networks, once for any number of cases.

    `weights` is a folder with members; by default /opt/ml/model if it has weights, else the shipped members. Options are those of the
    command line: `--min-members 2` is `min_members=2`.

    Raises WeightsBroken when a member can't be loaded, UsageError when an option is invalid.
    """
    from ensemble.pipeline import load_from_config

    if unknown := sorted(set(options) - set(Options.__annotations__)):
        known = ", ".join(Options.__annotations__)
        raise UsageError(f"load_ensemble has no option {', '.join(unknown)}", do=f"use one of: {known}")
    chosen: dict[str, Any] = {**options}
    if chosen.get("members") is not None:
        chosen["members"] = tuple(chosen["members"])
    return load_from_config(RunConfig(weights=None if weights is None else Path(weights), **chosen))


def segment(case: RawCase, ensemble: Ensemble, watcher: Watcher | None = None) -> Result:
    """Segment one case, and return its mask (`Result.mask`, bool, on the grid of the DWI) with all other results.

    `watcher` is notified of progress (see `ensemble.pipeline.Watcher`).

    Raises InputRefused when the images can't be segmented safely, MembersFailed when too few members voted.
    """
    from ensemble import pipeline
    from ensemble.progress import SilentWatcher

    return pipeline.segment_raw(case, ensemble, watcher or SilentWatcher())
