"""Findings of a segmented case: lesion volumes and locations, each with its uncertainty."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from ensemble.findings.locations import (
    LesionVolumes,
    LesionVoxels,
    measure_lesion_volumes,
    registration_perturbations,
    summarise_locations,
    transform_points,
)
from ensemble.findings.maps import LabelMap, measure_in_label_map
from ensemble.findings.registration import TemplateTransform, register_to_template
from ensemble.findings.template import SPACE, Template, shipped_template
from ensemble.findings.types import (
    Findings,
    LesionFinding,
    Pattern,
    TemplateRegistration,
    UncertainCategory,
    UncertainQuantity,
)
from ensemble.pipeline import Result
from ensemble.prepare.case import PreparedCase
from ensemble.types import FloatArray, Modality

log = logging.getLogger(__name__)

#: Lesions are called single where the largest holds at least this share of the volume.
SINGLE_SHARE = 0.9


def register_case_to_template(case: PreparedCase, atlas_template: Template | None = None) -> TemplateTransform | None:
    """Register the brain of a case to the template. Returns None if no transform was found; check `problems` of the result."""
    return register_to_template(
        case.tissue_normalized[Modality.DWI], case.tissue_normalized[Modality.ADC], case.brain.array, atlas_template
    )


def compute_findings(result: Result, maps: Sequence[LabelMap] = (), atlas_template: Template | None = None) -> Findings:
    """Compute the findings of a case, with a template (by default the shipped one) and the user's label maps.

    If the brain can't be registered to the template, findings that need it are absent, and `registered` says why.
    """
    started = time.perf_counter()
    atlas_template = atlas_template or shipped_template()
    placement = register_case_to_template(result.case, atlas_template)
    registered = _registered(placement)
    grid = result.case.grid
    own = LesionVoxels.of(result.fused.mask.array, grid)
    members = [LesionVoxels.of(o.prediction.mask.array, grid) for o in result.outcomes if o.prediction is not None]
    found = _without_places(own, members, registered)
    if placement is None or not registered.holds:
        log.info(
            "note: no locations in the findings, because registration to the template failed: %s",
            "; ".join(registered.problems),
        )
        return replace(found, seconds=time.perf_counter() - started)
    matrix, few = placement.matrix, own.thinned()
    centre = transform_points(matrix, grid.points_mm(np.argwhere(result.case.brain.array).mean(axis=0)))
    nearby = [other @ matrix for other in registration_perturbations(centre)]
    tallied, elsewhere = (
        measure_lesion_volumes(atlas_template, own, matrix),
        [measure_lesion_volumes(atlas_template, few, other) for other in nearby],
    )
    return replace(
        found,
        places=summarise_locations(
            tallied, [measure_lesion_volumes(atlas_template, member, matrix) for member in members], elsewhere
        ),
        lesions=_with_places(found.lesions, own, matrix, tallied, elsewhere),
        atlases=tuple(measure_in_label_map(one, own, few, members, matrix, nearby) for one in maps),
        seconds=time.perf_counter() - started,
    )


def _registered(placement: TemplateTransform | None) -> TemplateRegistration:
    if placement is None:
        return TemplateRegistration(SPACE, ("no transform to the template was found",), {}, None)
    rows = tuple(tuple(float(number) for number in row) for row in placement.matrix)
    checks = {
        name: [round(s, 3) for s in value] if isinstance(value, tuple) else round(value, 3)
        for name, value in asdict(placement).items()
        if name != "matrix"
    }
    return TemplateRegistration(SPACE, tuple(placement.problems()), checks, rows)


def _without_places(own: LesionVoxels, members: Sequence[LesionVoxels], registered: TemplateRegistration) -> Findings:
    """Return the findings that need no template."""
    volumes, others = own.volumes_ml, [member.volumes_ml for member in members]
    centres = own.centres_mm if len(volumes) else np.zeros((0, 3))
    return Findings(
        volume_ml=UncertainQuantity.of(float(volumes.sum()), [float(other.sum()) for other in others]),
        count=UncertainQuantity.of(len(volumes), [len(other) for other in others]),
        largest_ml=UncertainQuantity.of(
            float(volumes.max(initial=0.0)), [float(other.max(initial=0.0)) for other in others]
        ),
        pattern=UncertainCategory.of(lesion_pattern(volumes), [lesion_pattern(other) for other in others], ()),
        registered=registered,
        lesions=tuple(LesionFinding(float(ml), _triple(at)) for ml, at in zip(volumes, centres, strict=True)),
        places=None,
    )


def lesion_pattern(volumes_ml: FloatArray) -> Pattern:
    """Return the pattern of the lesions (none, single or scattered), from their volumes."""
    if not volumes_ml.any():
        return "none"
    return "single" if volumes_ml.max() >= SINGLE_SHARE * volumes_ml.sum() else "scattered"


def _with_places(
    lesions: Sequence[LesionFinding],
    own: LesionVoxels,
    matrix: FloatArray,
    tallied: LesionVolumes,
    elsewhere: Sequence[LesionVolumes],
) -> tuple[LesionFinding, ...]:
    if not lesions:
        return ()
    centres = transform_points(matrix, own.centres_mm) * (-1, -1, 1)

    def choices(own_words: list[str], other_words: list[list[str]]) -> list[UncertainCategory]:
        return [UncertainCategory.of(word, (), [other[n] for other in other_words]) for n, word in enumerate(own_words)]

    sides = choices(tallied.sides(), [other.sides() for other in elsewhere])
    regions = choices(tallied.regions(), [other.regions() for other in elsewhere])
    structures = choices(tallied.structures(), [other.structures() for other in elsewhere])
    return tuple(
        replace(lesion, centre_mni_mm=_triple(centre), side=side, region=region, structure=structure)
        for lesion, centre, side, region, structure in zip(lesions, centres, sides, regions, structures, strict=True)
    )


def _triple(point: FloatArray) -> tuple[float, float, float]:
    return float(point[0]), float(point[1]), float(point[2])
