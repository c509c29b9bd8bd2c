"""The run report, the picture and the closing lines say what happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread

from conftest import StubMember, phantom_case
from ensemble.config import ExtraOutputs
from ensemble.outputs.artifacts import SegmentedCase, case_artifacts
from ensemble.outputs.closing_lines import closing_lines
from ensemble.outputs.layouts.folder import FolderLayout
from ensemble.outputs.layouts.layout import artifacts_by_path, write_artifacts
from ensemble.outputs.report.figure import draw_overlay
from ensemble.outputs.report.run_report import build_report
from ensemble.pipeline import Ensemble, Result, segment_raw
from ensemble.progress import SilentWatcher
from ensemble.types import Modality
from ensemble.volume import from_sitk, to_sitk

Build = Callable[..., Ensemble]


@pytest.fixture
def ensemble(stub_ensemble: Build) -> Ensemble:
    members = (StubMember("a"), StubMember("b", error=RuntimeError("boom")), StubMember("f", needs=(Modality.FLAIR,)))
    return stub_ensemble(*members, min_members=1)


@pytest.fixture
def result(ensemble: Ensemble) -> Result:
    return segment_raw(phantom_case(), ensemble, SilentWatcher())


def test_report_is_json_and_says_what_became_of_each_member(ensemble: Ensemble, result: Result) -> None:
    report = json.loads(json.dumps(build_report(phantom_case(), result, ensemble), allow_nan=False))
    assert [(m["name"], m["status"], m.get("reason")) for m in report["members"]] == [
        ("a", "voted", None),
        ("b", "failed", "RuntimeError: boom"),
        ("f", "not applicable", "needs FLAIR"),
    ]
    assert report["lesion"] == {"volume_ml": pytest.approx(result.lesion_ml, abs=1e-3), "count": 1}
    assert report["fusion"] == {"method": "majority", "voters": ["a"], "specks_left_out": 0}
    assert report["config"]["min_members"] == 1
    assert report["versions"]["torch"].startswith("2.13")
    assert report["case"]["files"] == {"dwi": "dwi.mha", "adc": "adc.mha"}
    assert set(report["seconds"]) >= {"load members", "prepare", "member a", "fuse"}
    assert "Not a medical device" in report["notice"]


def red_pixels(path: Path) -> int:
    r, g, b = np.moveaxis(imread(path)[..., :3], -1, 0)
    return int(((r > 0.9) & (g < 0.4) & (b < 0.4)).sum())


def test_the_picture_outlines_the_lesion_and_only_a_lesion(
    tmp_path: Path, result: Result, stub_ensemble: Build
) -> None:
    draw_overlay(result, tmp_path / "lesion.png")
    assert red_pixels(tmp_path / "lesion.png") > 200
    healthy = segment_raw(phantom_case(), stub_ensemble(StubMember("a", level=9.0)), SilentWatcher())
    draw_overlay(healthy, tmp_path / "healthy.png")
    assert red_pixels(tmp_path / "healthy.png") == 0


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(False, False, False), (True, False, True), (True, True, True)])
def test_the_patients_left_is_on_the_right_whatever_the_axes(
    tmp_path: Path, stub_ensemble: Build, order: tuple[int, ...], flips: tuple[bool, ...]
) -> None:
    """The phantom's lesion lies to the patient's left and front: in each panel its outline is right of and above the middle."""
    raw = phantom_case()
    images = {}
    for modality, image in raw.images.items():
        turned = sitk.Flip(sitk.PermuteAxes(to_sitk(image.volume), order), flips, False)
        images[modality] = replace(image, volume=from_sitk(turned))
    result = segment_raw(replace(raw, images=images), stub_ensemble(StubMember("a")), SilentWatcher())
    draw_overlay(result, tmp_path / "overlay.png")
    r, g, b = np.moveaxis(imread(tmp_path / "overlay.png")[..., :3], -1, 0)
    red = (r > 0.9) & (g < 0.4) & (b < 0.4)
    panels = np.array_split(red, round(red.shape[1] / 310), axis=1)
    for half in (half for panel in panels for half in np.array_split(panel, 2)):
        down, right = (float(where.mean()) for where in np.nonzero(half))
        assert right > 0.55 * half.shape[1]
        assert down < 0.5 * half.shape[0]


def test_a_name_with_dollars_is_only_a_name(tmp_path: Path, result: Result) -> None:
    draw_overlay(replace(result, case=replace(result.case, name="fall$x_{$")), tmp_path / "overlay.png")
    assert red_pixels(tmp_path / "overlay.png") > 200


def test_a_name_that_is_no_text_is_shown_as_far_as_it_goes(tmp_path: Path, ensemble: Ensemble, result: Result) -> None:
    name = "fall\udce4"  # what Python makes of a file name in Latin-1
    made = replace(result, case=replace(result.case, name=name, repairs=(f"{name}: turned",)))
    case = SegmentedCase(replace(phantom_case(), name=name), made, ensemble)
    write_artifacts(artifacts_by_path(case_artifacts(case, ExtraOutputs(report=True)), FolderLayout(".mha")), tmp_path)
    assert red_pixels(tmp_path / "overlay.png") > 200
    assert "fall\ufffd: turned" in (tmp_path / "report.html").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["case"]["name"], report["repairs"]) == ("fall\ufffd", ["fall\ufffd: turned"])
    closing_lines(case, ExtraOutputs(), Path("/o"), ".mha").encode()


def test_closing_lines(ensemble: Ensemble, result: Result) -> None:
    case = SegmentedCase(phantom_case(), result, ensemble)
    text = closing_lines(case, ExtraOutputs(dicom=True), Path("/o"), ".nii.gz")
    for part in (
        "1 lesion, ",
        " ml (1 of 3 members voted)",
        "boom",
        "needs FLAIR",
        "/o/mask.nii.gz",
        "/o/overlay.png",
        "/o/report.html",
        "/o/report.json",
        "segmentation.dcm, measurements.dcm, picture.dcm",
    ):
        assert part in text
    nothing = replace(case, result=replace(result, lesion_count=0, lesion_ml=0.0))
    text = closing_lines(nothing, ExtraOutputs(), Path("/o"), ".mha")
    assert "no lesion found" in text
    assert "objects" not in text
