"""RawCase -> PreparedCase: check the images, repair what can be repaired safely, and record each repair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ensemble.config import Registration, RunConfig, SkullStrip
from ensemble.geometry import Grid
from ensemble.prepare.adc import compute_missing_adc
from ensemble.prepare.agreement import check_adc_belongs_to_dwi
from ensemble.prepare.background import clear_background, note_cut_off_brain, zero_unusable_voxels
from ensemble.prepare.draft import DraftCase, LazyImages, Note, Step
from ensemble.prepare.flair import align_flair, check_flair_size
from ensemble.prepare.grids import align_adc, check_adc_coverage
from ensemble.prepare.plausibility import check_plausibility
from ensemble.prepare.scale import check_brain_volume, check_scale
from ensemble.prepare.skull import extract_brain
from ensemble.prepare.units import normalize_intensities
from ensemble.prepare.values import check_complete, check_distinct, check_values
from ensemble.readers.base import RawCase, attach_reader_notes
from ensemble.types import Modality
from ensemble.volume import Volume

#: The steps of preparation, in their order. A case with several faults is refused by the first step that finds one.
STEPS: tuple[Step, ...] = (
    check_complete,
    check_values,
    check_distinct,
    check_scale,
    align_adc,
    extract_brain,
    check_adc_coverage,
    check_plausibility,
    check_brain_volume,
    check_adc_belongs_to_dwi,
    check_flair_size,
    align_flair,
    zero_unusable_voxels,
    clear_background,
    note_cut_off_brain,
    normalize_intensities,
)


@dataclass(frozen=True)
class PreparedCase:
    """The checked images of a case, all on the DWI grid."""

    name: str
    images: Mapping[Modality, Volume]
    """float32, intensities as read. Noise outside the brain is set to 0, since members crop to, and normalise by, what is not 0."""
    as_read: Mapping[Modality, Volume]
    """The same, but with noise outside the brain left as it is, as published members were trained. It is 0 there only if a skull was
    stripped. FLAIR is interpolated when it is first asked for."""
    tissue_normalized: Mapping[Modality, Volume]
    """float32, normalised by tissue: 1 is normal brain (see `prepare/units.py`), 0 is outside the brain."""
    brain: Volume
    """bool, the brain's foreground."""
    repairs: tuple[str, ...]
    """Repairs and remarks, one sentence each."""
    notes: tuple[Note, ...] = ()
    """The same as `repairs`, each with its step and image."""

    @property
    def grid(self) -> Grid:
        """The DWI grid, on which all images lie and the mask is written."""
        return self.images[Modality.DWI].grid

    @property
    def modalities(self) -> frozenset[Modality]:
        """Which images the case has."""
        return frozenset(self.images)


@attach_reader_notes
def prepare_raw(
    raw: RawCase,
    skull_strip: SkullStrip = "auto",
    device: str = "cpu",
    brain_ml: tuple[float, float] = RunConfig.brain_ml,
    registration: Registration = "auto",
    flair_is_needed: bool = True,
) -> PreparedCase:
    """Check a case, strip its skull, and resample its images to the DWI grid.

    `skull_strip` says whether a skull is stripped. `device` ("cpu", "cuda") runs HD-BET if needed; no other network runs here.
    `brain_ml` is the accepted brain volume (ml). With `registration` "never", or if
    FLAIR is not needed, it is aligned only by its header.

    Raises InputRefused when the case can't be segmented safely.
    """
    raw = compute_missing_adc(raw)
    paths = {modality: image.path for modality, image in raw.images.items()}
    images = {modality: image.volume for modality, image in raw.images.items()}
    case = DraftCase(raw.name, paths, images, skull_strip, device, brain_ml, registration, flair_is_needed)
    notes = [Note(text, modality, "readers") for modality, image in raw.images.items() for text in image.notes]
    for step in STEPS:
        case, noted = step(case)
        notes += [replace(note, step=step.__name__) for note in noted]
    return PreparedCase(
        name=case.name,
        images={modality: case.images[modality] for modality in Modality if modality in case.images},
        as_read=LazyImages({modality: case.as_read[modality] for modality in Modality if modality in case.images}),
        tissue_normalized=case.tissue_normalized,
        brain=case.dwi.like(case.brain),
        repairs=tuple(note.text for note in notes),
        notes=tuple(notes),
    )


def prepare_for_run(raw: RawCase, config: RunConfig, device: str, *, flair_is_needed: bool = True) -> PreparedCase:
    """Prepare a case with the options of a run. Raises as `prepare_raw` does."""
    return prepare_raw(raw, config.skull_strip, device, config.brain_ml, config.registration, flair_is_needed)
