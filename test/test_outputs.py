"""What is written of a case: one row a kind of output, a safe place for each in every layout, and an index of what a later run replaces."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import GRID, StubMember, phantom_case, tree, write_contract_case
from dicom_objects import origin_of
from ensemble.config import ExtraOutputs
from ensemble.contract.execute import segment_and_publish
from ensemble.contract.isles22 import find_inputs
from ensemble.findings import find, mni
from ensemble.findings.types import TemplateRegistration
from ensemble.geometry import Grid
from ensemble.outputs import artifacts as outputs
from ensemble.outputs.artifacts import MEMBER_ROLES, ROLES, Artifact, OutputRole, SegmentedCase, case_artifacts
from ensemble.outputs.layouts import bids
from ensemble.outputs.layouts.bids import BidsLayout, write_case
from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.outputs.layouts.contract import ContractLayout, output_patterns
from ensemble.outputs.layouts.folder import FolderLayout, publish_run_outputs
from ensemble.outputs.layouts.index import earlier_outputs
from ensemble.outputs.layouts.layout import Layout, artifacts_by_path, write_artifacts
from ensemble.pipeline import Ensemble, segment_raw
from ensemble.progress import SilentWatcher
from ensemble.readers.base import RawCase
from ensemble.readers.imagefile import read_case_files
from ensemble.serve.output_folder import OutputFolder
from ensemble.types import Modality
from flat_layout import Flat

Build = Callable[..., Ensemble]
ALL = ExtraOutputs(
    report=True,
    save_probabilities=True,
    save_member_masks=True,
    findings=True,
    save_mni=True,
    dicom=True,
    dicom_probability=True,
)
#: Names that members may have, and that look like something else.
NAMES = (
    "a",
    "mask",
    "votes",
    "report",
    "members",
    "a_mask",
    "mask_mask",
    ".b",
    "..-",
    "_",
    "A-B.c_",
    "results.json",
    "x" * 100,
)
LAYOUTS: dict[str, Layout] = {
    "folder": FolderLayout(".nii.gz"),
    "contract": ContractLayout("case-1.mha"),
    "contract, of a DWI called by a role": ContractLayout("mask.mha"),
    "bids": BidsLayout("sub-1", bids._labels(NAMES)),
    "example": Flat(),
}
FINDINGS: OutputRole[Any] = OutputRole("findings", "json", "", lambda case: {"lesions": case.result.lesion_count})


def segmented(build: Build, *names: str, flair: bool = False) -> SegmentedCase:
    raw, ensemble = phantom_case(flair), build(*map(StubMember, names))
    dwi = raw.images[Modality.DWI]
    raw = replace(raw, images={**raw.images, Modality.DWI: replace(dwi, origin=origin_of(dwi.volume))})
    return SegmentedCase(raw, segment_raw(raw, ensemble, SilentWatcher()), ensemble)


def with_study(raw: RawCase) -> RawCase:
    """The case as if its DWI had been read from DICOM."""
    dwi = raw.images[Modality.DWI]
    return replace(raw, images={**raw.images, Modality.DWI: replace(dwi, origin=origin_of(dwi.volume))})


def found(build: Build, *names: str) -> SegmentedCase:
    """A case with FLAIR whose place in the template is known."""
    case = segmented(build, *names, flair=True)
    registered = TemplateRegistration("template", (), {}, tuple(tuple(row) for row in np.eye(4).tolist()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(find, "register_case_to_template", lambda case, onto: None)
        findings = find.compute_findings(case.result)
    return replace(case, findings=replace(findings, registered=registered))


def files(folder: Path) -> set[str]:
    return {name for name, content in tree(folder).items() if content != b"<folder>"}


def listed(folder: Path) -> list[str]:
    written: list[str] = json.loads((folder / "report.json").read_text())["written"]
    return written


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_output_has_a_safe_place_of_its_own_whatever_members_are_called(layout: Layout) -> None:
    wanted = [Artifact(role) for role in ROLES]
    wanted += [Artifact(role, name) for role in MEMBER_ROLES for name in NAMES]
    places = artifacts_by_path(wanted, layout)
    assert len({place.casefold() for place in places}) == len(wanted)
    assert max(len(part) for place in places for part in place.split("/")) < 255


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_holds_all_outputs_of_a_case(
    tmp_path: Path, stub_ensemble: Build, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mni, "FULL_GRID", Grid((4, 5, 6), (30.0, 30.0, 30.0), (-60.0, -60.0, -60.0), GRID.direction))
    wanted = case_artifacts(found(stub_ensemble, "a", "votes"), ALL)
    places = artifacts_by_path(wanted, layout)
    write_artifacts(places, tmp_path)
    assert files(tmp_path) == set(places)
    assert len(places) == len(wanted) == len(ROLES) + 2 * len(MEMBER_ROLES)


@pytest.mark.parametrize(
    "places",
    [["../mask"], ["/mask"], [""], ["a/../../b"], ["a\0b"], ["a", "A"], ["a", "a"], ["a/b", "a"], ["a", "A/b"]],
)
def test_a_layout_that_leaves_the_folder_or_puts_two_into_one_is_found_out(places: list[str]) -> None:
    class Fixed:
        def __init__(self) -> None:
            self._places = iter(places)

        def place(self, artifact: Artifact) -> str:
            return next(self._places)

    with pytest.raises(ValueError, match="place"):
        artifacts_by_path([Artifact(ROLES[0])] * len(places), Fixed())


@pytest.mark.parametrize("name", ["a_b", "A", "", "a/b", "..", "a.b"])
def test_a_role_whose_name_a_member_could_have_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="no role"):
        OutputRole(name, "json", "", lambda case: None)
    with pytest.raises(ValueError, match="no role"):
        OutputRole("score", "no such format", "", lambda case: None)
    with pytest.raises(ValueError, match="no role"):
        OutputRole("score", "json", "no_such_option", lambda case: None)


@pytest.mark.slow
def test_a_new_kind_of_output_is_one_row(tmp_path: Path, stub_ensemble: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written by every command, is replaced with the rest, and goes when a call of the server fails."""
    case = segmented(stub_ensemble, "a")
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "ROLES", (*ROLES, FINDINGS))
        publish_run_outputs(case, ExtraOutputs(report=True), tmp_path / "run", ".nii.gz")
        assert json.loads((tmp_path / "run" / "findings.json").read_text()) == {"lesions": 1}
        found = find_inputs(write_contract_case(tmp_path / "in"))
        raw = read_case_files(found.name, found.files)
        segment_and_publish(found, raw, tmp_path / "contract", case.ensemble, ExtraOutputs(), SilentWatcher())
        assert "findings.json" in files(tmp_path / "contract")
        write_case(tmp_path / "batch", tmp_path / "scratch", BidsEntities("1"), case, ExtraOutputs(), {"key": "x"})
        assert (tmp_path / "batch" / "sub-1" / "findings.json").is_file()
        assert "**/findings.json" in bids._no_bids()
        folder = OutputFolder()
        folder.begin(tmp_path / "server")
        (tmp_path / "server").mkdir()
        (tmp_path / "server" / "findings.json").write_text("of a process that was killed")
        folder.restore()
        assert not (tmp_path / "server").exists()
    publish_run_outputs(case, ExtraOutputs(report=True), tmp_path / "run", ".nii.gz")
    assert "findings.json" not in files(tmp_path / "run"), "a later version without it replaces it, too"
    segment_and_publish(found, raw, tmp_path / "contract", case.ensemble, ExtraOutputs(), SilentWatcher())
    assert "findings.json" not in files(tmp_path / "contract")


def test_the_index_lists_what_was_written_and_a_later_run_replaces_that_alone(
    tmp_path: Path, stub_ensemble: Build
) -> None:
    publish_run_outputs(segmented(stub_ensemble, "a", "b"), ALL, tmp_path, ".mha")
    assert set(listed(tmp_path)) == files(tmp_path)
    for mine in ("votes.nrrd", "mask.nrrd", "members/other_mask.mha", "members/deep/c_mask.mha"):
        (tmp_path / mine).parent.mkdir(exist_ok=True)
        (tmp_path / mine).write_text("mine")
    publish_run_outputs(segmented(stub_ensemble, "b"), ExtraOutputs(report=True), tmp_path, ".nii.gz")
    mine_still = {"votes.nrrd", "mask.nrrd", "members/other_mask.mha", "members/deep/c_mask.mha"}
    assert files(tmp_path) == {"mask.nii.gz", "report.json", "report.html", "overlay.png"} | mine_still
    assert set(listed(tmp_path)) == files(tmp_path) - mine_still


@pytest.mark.slow
@pytest.mark.parametrize(
    "report", [None, "{}", "no json", '{"written": "mine.txt"}', '{"written": [1, {}]}', "[" * 9000]
)
def test_outputs_of_a_version_without_index_are_replaced_by_their_names(
    tmp_path: Path, stub_ensemble: Build, report: str | None
) -> None:
    old = ("mask.mha", "votes.nii.gz", "members/a_mask.nrrd", "members/x/b_probability.mha", "overlay.png")
    for name in (*old, "mine.txt", "members/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    if report is not None:
        (tmp_path / "report.json").write_text(report)
    publish_run_outputs(segmented(stub_ensemble, "a"), ExtraOutputs(report=True), tmp_path, ".nii.gz")
    assert files(tmp_path) == {
        "mask.nii.gz",
        "report.json",
        "report.html",
        "overlay.png",
        "mine.txt",
        "members/notes.txt",
    }


@pytest.mark.parametrize("holder", ["report.json", "results.json"])
def test_an_index_removes_nothing_outside_its_folder(tmp_path: Path, holder: str) -> None:
    root, outside = tmp_path / "out", tmp_path / "outside"
    for path in (root / "own.txt", outside / "precious.txt"):
        path.parent.mkdir()
        path.write_text("x")
    (root / "link").symlink_to(outside)
    places = [
        "../outside/precious.txt",
        str(outside / "precious.txt"),
        "link/precious.txt",
        "a\0",
        "x" * 5000,
        ".",
        "own.txt",
    ]
    (root / holder).write_text(json.dumps({"written": places}))
    assert earlier_outputs(root) == ["own.txt"]


def test_the_contracts_results_are_the_platforms_and_list_extras_only_where_there_are_some(
    tmp_path: Path, stub_ensemble: Build
) -> None:
    found = find_inputs(write_contract_case(tmp_path / "in"))
    raw, ensemble = read_case_files(found.name, found.files), stub_ensemble(StubMember("a"))
    segment_and_publish(found, raw, tmp_path / "out", ensemble, ExtraOutputs(save_member_masks=True), SilentWatcher())
    (results,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results.pop("written") == ["members/a_mask.mha", "votes.mha"]
    assert [results] == found.results
    assert files(tmp_path / "out" / "images") == {"stroke-lesion-segmentation/case-1.mha"}
    (tmp_path / "out" / "probability.mha").write_text("mine")
    segment_and_publish(found, raw, tmp_path / "out", ensemble, ExtraOutputs(), SilentWatcher())
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found.results
    assert files(tmp_path / "out") == {
        "results.json",
        "probability.mha",
        f"images/stroke-lesion-segmentation/{found.mask_name}",
    }


def test_what_a_killed_process_leaves_is_known_by_the_places_of_the_contract() -> None:
    assert set(output_patterns()) == {
        "results.json",
        "images/stroke-lesion-segmentation/*.mha",
        *("probability.mha", "votes.mha", "report.json", "report.html", "overlay.png"),
        *("mnimask.mha", "mnidwi.mha", "mniadc.mha", "mniflair.mha"),
        *("segmentation.dcm", "measurements.dcm", "picture.dcm", "probability.dcm"),
        *("members/*_mask.mha", "members/*_probability.mha"),
    }
