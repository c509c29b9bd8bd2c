"""The ISLES'22 contract: what is read, what is written, under which names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from conftest import GRID, StubMember, phantom_arrays, phantom_lesion, tree, write_contract_case, write_image
from ensemble.config import ExtraOutputs
from ensemble.contract.execute import segment_and_publish
from ensemble.contract.isles22 import find_inputs
from ensemble.errors import InputRefused, MembersFailed, UsageError
from ensemble.outputs.layouts.contract import earlier_masks
from ensemble.pipeline import Ensemble
from ensemble.progress import SilentWatcher
from ensemble.readers.imagefile import read_case_files
from ensemble.types import Modality
from ensemble.volume import grid_of

Build = Callable[..., Ensemble]
DWI, ADC, FLAIR = Modality.DWI, Modality.ADC, Modality.FLAIR
SLUGS = {DWI: "dwi-brain-mri", ADC: "adc-brain-mri", FLAIR: "flair-brain-mri"}


def run(root: Path, output: Path, ensemble: Ensemble, extras: ExtraOutputs | None = None) -> None:
    found = find_inputs(root)
    segment_and_publish(
        found, read_case_files(found.name, found.files), output, ensemble, extras or ExtraOutputs(), SilentWatcher()
    )


def test_mask_and_results_are_exactly_the_contracts(tmp_path: Path, stub_ensemble: Build) -> None:
    write_contract_case(tmp_path / "in", name="3f1c")
    (tmp_path / "out").mkdir()
    before = tree(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", stub_ensemble(StubMember("a")))
    mask_path = tmp_path / "out" / "images" / "stroke-lesion-segmentation" / "3f1c.mha"
    assert set(tree(tmp_path / "out")) == {
        "images",
        "images/stroke-lesion-segmentation",
        "images/stroke-lesion-segmentation/3f1c.mha",
        "results.json",
    }
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == [
        {
            "outputs": [{"type": "Image", "slug": "stroke-lesion-segmentation", "filename": "3f1c.mha"}],
            "inputs": [{"type": "Image", "slug": "dwi-brain-mri", "filename": "3f1c.mha"}],
        }
    ]
    mask = sitk.ReadImage(str(mask_path))
    assert mask.GetPixelID() == sitk.sitkUInt8
    assert grid_of(mask) == GRID
    assert set(np.unique(sitk.GetArrayFromImage(mask))) == {0, 1}
    assert (sitk.GetArrayFromImage(mask) == phantom_lesion()).mean() > 0.999
    assert tree(tmp_path / "in") == before


def test_an_empty_mask_is_still_a_mask(tmp_path: Path, stub_ensemble: Build) -> None:
    run(write_contract_case(tmp_path / "in"), tmp_path / "out", stub_ensemble(StubMember("a", level=9.0)))
    mask = sitk.ReadImage(str(tmp_path / "out" / "images" / "stroke-lesion-segmentation" / "case-1.mha"))
    assert not sitk.GetArrayFromImage(mask).any()


def test_a_dwi_of_another_format_gives_an_mha_mask(tmp_path: Path, stub_ensemble: Build) -> None:
    root = write_contract_case(tmp_path / "in")
    (root / "images" / "dwi-brain-mri" / "case-1.mha").unlink()
    write_image(phantom_arrays()[DWI], root / "images" / "dwi-brain-mri" / "my scan.nii.gz")
    run(root, tmp_path / "out", stub_ensemble(StubMember("a")))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results[0]["outputs"][0]["filename"] == "my scan.mha"
    assert results[0]["inputs"][0]["filename"] == "my scan.nii.gz"
    assert (tmp_path / "out" / "images" / "stroke-lesion-segmentation" / "my scan.mha").is_file()


def test_extras_lie_beside_the_mask_when_asked_for(tmp_path: Path, stub_ensemble: Build) -> None:
    ensemble = stub_ensemble(StubMember("a"), StubMember("b", level=9.0))
    extras = ExtraOutputs(report=True, save_probabilities=True, save_member_masks=True)
    run(write_contract_case(tmp_path / "in"), tmp_path / "out", ensemble, extras)
    assert {name for name in tree(tmp_path / "out") if "." in name} == {
        "images/stroke-lesion-segmentation/case-1.mha",
        "results.json",
        "report.json",
        "report.html",
        "overlay.png",
        "probability.mha",
        "votes.mha",
        *(f"members/{name}_{what}.mha" for name in "ab" for what in ("mask", "probability")),
    }
    votes = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "votes.mha")))
    assert set(np.unique(votes)) == {0, 1}


def test_a_failure_leaves_the_output_folder_alone(tmp_path: Path, stub_ensemble: Build) -> None:
    write_contract_case(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("of an earlier case")
    with pytest.raises(MembersFailed):
        run(tmp_path / "in", tmp_path / "out", stub_ensemble(StubMember("a", error=RuntimeError("x"))))
    assert tree(tmp_path / "out") == {"results.json": b"of an earlier case"}


def entry(form: str, modality: Modality) -> dict[str, Any]:
    socket = {"slug": SLUGS[modality], "relative_path": f"images/{SLUGS[modality]}", "kind": "Image"}
    keys = {"interface": ["interface"], "both": ["interface", "socket"], "socket": ["socket"]}[form]
    return {**dict.fromkeys(keys, socket), "image": {"name": "x.mha"}, "value": None}


@pytest.mark.parametrize("form", ["interface", "both", "socket"])
def test_inputs_json_in_its_three_forms(tmp_path: Path, form: str) -> None:
    write_contract_case(tmp_path, flair=True)
    other = {"socket": {"slug": "age", "relative_path": "age.json"}, "value": 60}
    (tmp_path / "inputs.json").write_text(json.dumps([entry(form, modality) for modality in Modality] + [other]))
    assert find_inputs(tmp_path).files == {
        DWI: tmp_path / "images" / "dwi-brain-mri" / "case-1.mha",
        ADC: tmp_path / "images" / "adc-brain-mri" / "some-adc.mha",
        FLAIR: tmp_path / "images" / "flair-brain-mri" / "some-flair.mha",
    }


def test_inputs_json_may_name_another_folder(tmp_path: Path) -> None:
    write_contract_case(tmp_path)
    (tmp_path / "images" / "dwi-brain-mri").rename(tmp_path / "images" / "elsewhere")
    moved = {"socket": {"slug": "dwi-brain-mri", "relative_path": "images/elsewhere"}}
    (tmp_path / "inputs.json").write_text(json.dumps([moved]))
    assert find_inputs(tmp_path).files[DWI] == tmp_path / "images" / "elsewhere" / "case-1.mha"


def test_a_flair_that_is_listed_must_be_there(tmp_path: Path) -> None:
    write_contract_case(tmp_path)
    assert FLAIR not in find_inputs(tmp_path).files
    (tmp_path / "inputs.json").write_text(json.dumps([entry("socket", FLAIR)]))
    with pytest.raises(InputRefused, match="no FLAIR image"):
        find_inputs(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[1]",
        '{"a": 1}',
        '[{"image": {}}]',
        '[{"socket": {"slug": "dwi-brain-mri"}}]',
        '[{"socket": {"slug": "dwi-brain-mri", "relative_path": "../../etc"}}]',
        '[{"socket": {"slug": "dwi-brain-mri", "relative_path": "/etc"}}]',
    ],
)
def test_an_inputs_json_that_makes_no_sense_is_refused(tmp_path: Path, text: str) -> None:
    write_contract_case(tmp_path)
    (tmp_path / "inputs.json").write_text(text)
    with pytest.raises(InputRefused, match="inputs.json is not valid"):
        find_inputs(tmp_path)


def dwi_folder(root: Path) -> Path:
    return root / "images" / "dwi-brain-mri"


@pytest.mark.parametrize(
    ("spoil", "message", "found"),
    [
        (lambda r: shutil.rmtree(r), "input folder does not exist", ""),
        (lambda r: shutil.rmtree(dwi_folder(r)), "no DWI image", "no such folder"),
        (lambda r: (dwi_folder(r) / "case-1.mha").unlink(), "no DWI image", "an empty folder"),
        (lambda r: (dwi_folder(r) / "case-1.mha").rename(dwi_folder(r) / "scan.txt"), "no DWI image", "scan.txt"),
        (lambda r: shutil.copy(dwi_folder(r) / "case-1.mha", dwi_folder(r) / "2.mha"), "more than one DWI", "2.mha, case-1.mha"),
        (lambda r: shutil.rmtree(r / "images" / "adc-brain-mri"), "no ADC image", "no such folder"),
        (lambda r: (r / "images" / "flair-brain-mri").mkdir() or (r / "images/flair-brain-mri/x.txt").touch(), "no FLAIR", "x.txt"),
    ],
)  # fmt: skip
def test_missing_and_surplus_images_are_refused(
    tmp_path: Path, spoil: Callable[[Path], object], message: str, found: str
) -> None:
    spoil(write_contract_case(tmp_path / "in"))
    with pytest.raises(InputRefused, match=message) as refusal:
        find_inputs(tmp_path / "in")
    assert found in refusal.value.found
    assert refusal.value.where.startswith(str(tmp_path))


def test_the_outputs_of_an_earlier_case_go(tmp_path: Path, stub_ensemble: Build) -> None:
    ensemble, extras = stub_ensemble(StubMember("a")), ExtraOutputs(report=True, save_member_masks=True)
    run(write_contract_case(tmp_path / "one", name="first[1]"), tmp_path / "out", ensemble, extras)
    (tmp_path / "out" / "images" / "mine.mha").write_text("of somebody else")
    run(write_contract_case(tmp_path / "two", name="second"), tmp_path / "out", ensemble)
    assert [name for name, content in tree(tmp_path / "out").items() if content != b"<folder>"] == [
        "images/mine.mha",
        "images/stroke-lesion-segmentation/second.mha",
        "results.json",
    ]


def test_a_mask_of_which_nothing_is_known_is_not_joined_by_another(tmp_path: Path, stub_ensemble: Build) -> None:
    """Two masks are rejected by the platform; and what is nobody's is not ours to remove."""
    stray = tmp_path / "out" / "images" / "stroke-lesion-segmentation" / "other.mha"
    stray.parent.mkdir(parents=True)
    stray.write_text("left by who knows")
    with pytest.raises(UsageError, match="a mask of another case") as refusal:
        run(write_contract_case(tmp_path / "in"), tmp_path / "out", stub_ensemble(StubMember("a")))
    assert "other.mha" in refusal.value.found
    assert [name for name, content in tree(tmp_path / "out").items() if content != b"<folder>"] == [
        "images/stroke-lesion-segmentation/other.mha"
    ]
    stray.rename(stray.with_name("case-1.mha"))
    run(tmp_path / "in", tmp_path / "out", stub_ensemble(StubMember("a")))


def test_extras_of_other_members_and_options_go(tmp_path: Path, stub_ensemble: Build) -> None:
    root, extras = write_contract_case(tmp_path / "in"), ExtraOutputs(save_probabilities=True, save_member_masks=True)
    run(root, tmp_path / "out", stub_ensemble(StubMember("a"), StubMember(".b"), StubMember("A-B.c_")), extras)
    assert len(list((tmp_path / "out" / "members").iterdir())) == 6
    run(root, tmp_path / "out", stub_ensemble(StubMember("d")), ExtraOutputs(save_member_masks=True))
    assert {name for name in tree(tmp_path / "out") if name.endswith(".mha") and "stroke" not in name} == {
        "votes.mha",
        "members/d_mask.mha",
    }


@pytest.mark.parametrize(
    "content", ["", "[]", "[1]", '[{"outputs": [{"slug": "stroke-lesion-segmentation"}]}]', "[" * 2000]
)
def test_an_earlier_results_json_of_somebody_else_names_no_mask(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    assert earlier_masks(tmp_path) == []


def test_an_earlier_results_json_names_masks_in_their_folder_only(tmp_path: Path) -> None:
    outputs = [{"slug": "stroke-lesion-segmentation", "filename": name} for name in ("a.mha", "../b.mha", "/c.mha")]
    (tmp_path / "results.json").write_text(json.dumps([{"outputs": outputs}]))
    assert earlier_masks(tmp_path) == ["images/stroke-lesion-segmentation/a.mha"]


def test_hidden_files_and_an_empty_flair_folder_do_not_count(tmp_path: Path) -> None:
    write_contract_case(tmp_path)
    (tmp_path / "images" / "flair-brain-mri").mkdir()
    (dwi_folder(tmp_path) / "._case-1.mha").write_text("left by a Mac")
    assert set(find_inputs(tmp_path).files) == {DWI, ADC}


def test_dicom_files_without_ending_are_a_series(tmp_path: Path) -> None:
    write_contract_case(tmp_path)
    next(dwi_folder(tmp_path).glob("*.mha")).unlink()
    (dwi_folder(tmp_path) / "README").write_text("from the PACS")
    (dwi_folder(tmp_path) / "IM0001").write_bytes(bytes(128) + b"DICM")
    assert find_inputs(tmp_path).files[Modality.DWI] == dwi_folder(tmp_path)


def test_a_slice_that_joins_a_dicom_folder_while_a_case_runs_is_noticed(tmp_path: Path) -> None:
    write_contract_case(tmp_path)
    series = dwi_folder(tmp_path) / "series"
    next(dwi_folder(tmp_path).glob("*.mha")).unlink()
    series.mkdir()
    (series / "1.dcm").write_bytes(b"one")
    found = find_inputs(tmp_path)
    found.refuse_if_changed()
    (series / "2.dcm").write_bytes(b"two")
    with pytest.raises(InputRefused, match="has changed while the case was being segmented") as refusal:
        found.refuse_if_changed()
    assert refusal.value.where == str(series / "2.dcm")


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: shutil.copy(path.parent / "other", path)])
def test_inputs_that_change_while_a_case_runs_are_refused(
    tmp_path: Path, stub_ensemble: Build, spoil: Callable[[Path], object]
) -> None:
    found = find_inputs(write_contract_case(tmp_path / "in"))
    raw = read_case_files(found.name, found.files)
    adc = found.files[ADC]
    (adc.parent / "other").write_text("something else")
    spoil(adc)
    with pytest.raises(InputRefused, match="while the case was being segmented"):
        segment_and_publish(
            found, raw, tmp_path / "out", stub_ensemble(StubMember("a")), ExtraOutputs(), SilentWatcher()
        )
    assert not (tmp_path / "out").exists()
