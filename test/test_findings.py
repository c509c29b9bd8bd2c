"""Where lesions lie: in heads whose place in the template is known, told right, with a range, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import template_heads as heads
from conftest import REPOSITORY, StubMember
from ensemble.batch.summary import SummaryRow, _of_report
from ensemble.config import ExtraOutputs
from ensemble.families.base import MemberPrediction
from ensemble.findings import find as finding
from ensemble.findings.find import compute_findings, lesion_pattern, register_case_to_template
from ensemble.findings.locations import (
    LesionVolumes,
    LesionVoxels,
    lesion_side,
    measure_lesion_volumes,
    registration_perturbations,
    structure_probabilities,
    transform_points,
)
from ensemble.findings.mni import resample_image_to_mni, resample_mask_to_mni
from ensemble.findings.registration import TemplateTransform
from ensemble.findings.template import FULL_GRID, GRID, AtlasStructure, shipped_template
from ensemble.findings.types import Findings
from ensemble.outputs.artifacts import SegmentedCase, case_artifacts
from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.outputs.report.findings_text import describe_findings
from ensemble.outputs.report.page import render_case_page
from ensemble.pipeline import Ensemble, MemberOutcome, segment_raw
from ensemble.progress import SilentWatcher
from ensemble.text import spreadsheet_cell
from ensemble.types import Modality
from json_schema import faults

#: Points of the template (RAS, mm), and what is there.
THALAMUS_LEFT, WHITE_RIGHT, CEREBELLUM_RIGHT, PONS = (-12, -18, 8), (27, -10, 32), (27, -62, -40), (0, -28, -30)


@pytest.fixture(scope="module")
def placement() -> TemplateTransform:
    found = register_case_to_template(heads.case())
    assert found is not None
    return found


@pytest.fixture(scope="module")
def found(placement: TemplateTransform) -> Findings:
    """Of lesions in left thalamus (the largest), right white matter, right cerebellum and pons."""
    mask = heads.ball(THALAMUS_LEFT, radius_mm=8.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finding, "register_case_to_template", lambda case, onto: placement)
        return compute_findings(heads.result(mask | heads.ball(WHITE_RIGHT, CEREBELLUM_RIGHT, PONS, radius_mm=6.0)))


def test_a_head_is_brought_to_where_it_lies(placement: TemplateTransform) -> None:
    assert not placement.problems()
    brain = np.argwhere(heads.case().brain.array)[::50, ::-1]
    points = brain @ heads.GRID.affine[:3, :3].T + heads.GRID.affine[:3, 3]
    apart = np.linalg.norm(
        transform_points(placement.matrix, points) - transform_points(heads.true_matrix(), points), axis=1
    )
    assert apart.mean() < 2.0
    assert placement.overlap > 0.9
    assert placement.covered > 0.9


def test_no_digit_of_the_place_hangs_on_threads(placement: TemplateTransform) -> None:
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    try:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1 if threads > 1 else 3)
        again = register_case_to_template(heads.case())
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    assert again is not None
    assert np.array_equal(again.matrix, placement.matrix)


@pytest.mark.parametrize(
    ("what", "harder"),
    [
        ("half a brain", heads.with_half),
        ("upside down", lambda case: heads.under_header(case, np.diag([1.0, 1.0, -1.0]))),
        ("turned", lambda case: heads.under_header(case, np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]))),
    ],
)
def test_what_is_no_whole_head_as_its_header_says_gets_no_place(what: str, harder: Callable) -> None:  # type: ignore[type-arg]
    case = harder(heads.case())
    told = compute_findings(heads.result(heads.ball(THALAMUS_LEFT), case))
    assert told.registered.problems
    assert told.places is None
    assert told.as_json()["registration"]["status"] == "failed"
    assert [lesion.side for lesion in told.lesions] == [None]
    assert told.volume_ml.value > 0
    assert "location unknown" in "; ".join(describe_findings(told))


def test_each_limit_is_checked(placement: TemplateTransform) -> None:
    for change, word in (
        ({"overlap": 0.5}, "overlaps"),
        ({"covered": 0.4}, "40%"),
        ({"scale": (2.0, 1.1, 1.0)}, "scale"),
        ({"scale": (1.5, 1.1, 0.8)}, "scale"),
        ({"turn_degrees": 80.0}, "rotation"),
        ({"likeness": 0.0}, "look like"),
    ):
        (problem,) = replace(placement, **change).problems()  # type: ignore[arg-type]
        assert word in problem


def test_lesions_are_told_where_they_lie(found: Findings) -> None:
    told = [(one.side, one.region, one.structure) for one in found.lesions]
    words = [tuple(choice.value for choice in one if choice is not None) for one in told]
    assert words[0] == ("left", "cerebrum", "deep grey")
    assert ("right", "cerebrum", "white matter") in words
    assert ("right", "cerebellum", "cerebellum") in words
    assert any(word[1:] == ("brain stem", "brain stem") for word in words)
    assert found.places is not None
    assert found.places.side is not None
    assert found.places.side.value == "both"
    assert found.pattern.value == "scattered"
    middle = found.lesions[0].centre_mni_mm
    assert middle == pytest.approx(THALAMUS_LEFT, abs=4.0)


def test_amounts_add_up_and_lie_in_their_ranges(found: Findings) -> None:
    assert found.places is not None
    for amounts in (found.places.sides, found.places.regions, found.places.structures):
        assert sum(amount.share.value for amount in amounts) == pytest.approx(1.0, abs=1e-3)
        for amount in amounts:
            for quantity in (amount.ml, amount.share):
                assert quantity.placement is not None
                assert quantity.placement[0] <= quantity.value <= quantity.placement[1]
                assert quantity.members[0] <= quantity.value <= quantity.members[1]


def test_a_lesion_at_a_border_might_be_something_else(placement: TemplateTransform) -> None:
    """The thalamus lies amidst, a ball beside the midline might lie on either side."""
    nearby = [other @ placement.matrix for other in registration_perturbations(np.array([0.0, 20.0, 0.0]))]
    sides = {}
    for name, at in (("midline", (-5, 20, 45)), ("aside", THALAMUS_LEFT)):
        sample = LesionVoxels.of(heads.ball(at, radius_mm=6.0), heads.GRID)
        sides[name] = {measure_lesion_volumes(shipped_template(), sample, matrix).sides()[0] for matrix in nearby}
    assert sides["aside"] == {"left"}
    assert len(sides["midline"]) > 1


def test_ranges_span_the_members(placement: TemplateTransform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "register_case_to_template", lambda case, onto: placement)
    like = heads.case().tissue_normalized[Modality.DWI].like
    masks = [heads.ball(THALAMUS_LEFT, radius_mm=r) for r in (5.0, 9.0)]
    outcomes = tuple(
        MemberOutcome(str(n), "voted", prediction=MemberPrediction(str(n), like(mask.astype(np.float32)), networks=1))
        for n, mask in enumerate(masks)
    )
    told = compute_findings(replace(heads.result(heads.ball(THALAMUS_LEFT)), outcomes=outcomes))
    volumes = sorted(mask.sum() * heads.GRID.voxel_ml for mask in masks)
    assert told.volume_ml.members == pytest.approx(tuple(volumes))
    assert told.places is not None
    deep = next(amount for amount in told.places.structures if amount.name == "deep grey")
    assert deep.ml.members[0] < deep.ml.value < deep.ml.members[1]


@pytest.mark.parametrize(
    ("left", "right", "least", "side"),
    [
        (1, 0, 0.25, "left"),
        (0, 2, 0.25, "right"),
        (3, 1, 0.25, "both"),
        (3.1, 1, 0.25, "left"),
        (0, 0, 0.25, "unknown"),
    ],
)
def test_sides_by_volume(left: float, right: float, least: float, side: str) -> None:
    assert lesion_side(left, right, least) == side


def test_what_spills_over_the_midline_makes_no_second_side() -> None:
    volumes = np.zeros((2, 2, 5))
    volumes[0, :, 0] = (8.0, 2.0)  # one large lesion near the midline
    volumes[1, :, 0] = (0.1, 0.0)
    assert LesionVolumes(volumes).side() == "left"
    volumes[1, :, 0] = (0.0, 1.0)
    assert LesionVolumes(volumes).side() == "both"


def test_patterns() -> None:
    assert [lesion_pattern(np.array(v)) for v in ([], [3.0], [9.5, 0.5], [5.0, 5.0])] == [
        "none",
        "single",
        "single",
        "scattered",
    ]


def test_no_lesion_is_no_place_and_no_error(placement: TemplateTransform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "register_case_to_template", lambda case, onto: placement)
    told = compute_findings(heads.result(np.zeros(heads.GRID.shape_zyx, bool)))
    assert told.as_json()["pattern"]["value"] == "none"
    assert told.places is not None
    assert told.places.side is None
    assert not told.lesions


def test_samples_are_thinned_lesion_by_lesion() -> None:
    number = np.repeat([0, 1], [10_000, 3])
    sample = LesionVoxels(np.arange(30_009.0).reshape(-1, 3), np.full(10_003, 0.008), number)
    thin = sample.thinned()
    assert len(thin.ml) < 4000
    assert thin.volumes_ml == pytest.approx(sample.volumes_ml)


def test_the_atlas_is_where_the_template_is() -> None:
    onto = shipped_template()
    total = onto.left.sum(axis=0) + onto.left[..., ::-1].sum(axis=0)
    assert total.max() <= 1.05
    assert total[onto.hull].mean() > 0.8
    assert total[~onto.hull].mean() < 0.05
    points = np.array([(-x, -y, z) for x, y, z in (THALAMUS_LEFT, WHITE_RIGHT, CEREBELLUM_RIGHT)], float)
    chances = structure_probabilities(onto, points)
    assert chances[0, AtlasStructure.DEEP_GREY, 0] > 0.8
    assert chances[1, AtlasStructure.WHITE_MATTER, 1] > 0.8
    assert chances[1, AtlasStructure.CEREBELLUM, 2] > 0.8
    assert GRID.affine[0, 3] + GRID.spacing_mm[0] * (GRID.size[0] - 1) / 2 == 0  # mirrored about x = 0


def test_images_in_mni_lie_on_the_template(found: Findings) -> None:
    assert found.registered.matrix is not None
    mask = heads.case().brain
    carried = resample_mask_to_mni(mask, found.registered.matrix)
    assert carried.grid == FULL_GRID
    hull = shipped_template().hull
    both = carried.array[::2, ::2, ::2] & hull
    assert 2 * both.sum() / (carried.array[::2, ::2, ::2].sum() + hull.sum()) > 0.9
    dwi = resample_image_to_mni(heads.case().images[Modality.DWI], found.registered.matrix)
    assert dwi.array.dtype == np.float32


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict]:  # type: ignore[type-arg]
    return {
        name: json.loads((REPOSITORY / "docs" / f"{name}.schema.json").read_text(encoding="utf-8"))
        for name in ("report", "summary")
    }


@pytest.fixture
def segmented(stub_ensemble: Callable[..., Ensemble], found: Findings) -> Callable[[bool], SegmentedCase]:
    ensemble = stub_ensemble(StubMember("a"), StubMember("b", error=RuntimeError("boom")), min_members=1)
    case = segment_raw(heads.raw(), ensemble, SilentWatcher())
    mask = heads.ball(THALAMUS_LEFT, radius_mm=8.0) | heads.ball(WHITE_RIGHT, CEREBELLUM_RIGHT, PONS, radius_mm=6.0)
    fused = replace(case.fused, mask=case.fused.mask.like(mask))
    return lambda on: SegmentedCase(heads.raw(), replace(case, fused=fused), ensemble, found if on else None)


@pytest.mark.parametrize("on", [True, False])
def test_report_and_summary_are_as_their_schemas_say(segmented, schemas, tmp_path: Path, on: bool) -> None:  # type: ignore[no-untyped-def]
    report = json.loads(json.dumps(segmented(on).report, allow_nan=False))
    assert list(faults(report, schemas["report"])) == []
    row = _of_report(SummaryRow("a", "a", "", "done"), report, BidsEntities("a"), tmp_path)
    text = {key: "" if value is None else str(spreadsheet_cell(value)) for key, value in vars(row).items()}
    assert list(faults(text, schemas["summary"])) == []
    assert list(text) == schemas["summary"]["required"]
    assert (text["findings"], text["side"]) == (("ok", "both") if on else ("off", ""))
    assert bool(text["deep_grey_ml"]) == on


def test_a_schema_can_fail(segmented, schemas) -> None:  # type: ignore[no-untyped-def]
    report = json.loads(json.dumps(segmented(True).report))
    report["findings"]["pattern"]["value"] = "odd"
    report["findings"]["lesions"][0]["centre_lps_mm"].pop()
    report["findings"]["places"]["more"] = 1
    assert len(list(faults(report["findings"], schemas["report"]["$defs"]["findings"], schemas["report"]))) == 3


def test_the_page_has_findings_where_they_were_asked_for(segmented) -> None:  # type: ignore[no-untyped-def]
    case = segmented(True)
    page = render_case_page(case.report, case.result, case.findings)
    assert "deep grey" in page
    assert "MNI (RAS, mm)" in page
    assert 'id="findings"' not in render_case_page(case.report, case.result)


def test_mni_images_are_written_only_where_the_place_is_known(segmented) -> None:  # type: ignore[no-untyped-def]
    extras, case = ExtraOutputs(findings=True, save_mni=True), segmented(True)
    names = [one.role.name for one in case_artifacts(case, extras)]
    assert names == ["mask", "mnimask", "mnidwi", "mniadc"]
    failed = replace(
        case, findings=replace(case.findings, registered=replace(case.findings.registered, problems=("odd",)))
    )
    assert [one.role.name for one in case_artifacts(failed, extras)] == ["mask"]
