"""The tree of results: a place for each case and each member, names that BIDS knows, and nothing of anybody else's."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batch_runs import comparable, rows, run_batch, touch, write_case
from conftest import StubMember, phantom_case, tree
from ensemble.config import ExtraOutputs
from ensemble.errors import UsageError
from ensemble.outputs.artifacts import SegmentedCase
from ensemble.outputs.layouts.bids import write_case as write_results
from ensemble.outputs.layouts.bids_entities import BidsEntities, assign_entities
from ensemble.pipeline import Ensemble, segment_raw
from ensemble.progress import SilentWatcher


def test_names_become_bids_labels_and_never_meet() -> None:
    names = ["sub-01/ses-a", "sub-02", "case_01", "case 02", "case-02", "Case02", "日本", "sub-01", "x/ses-1"]
    places = assign_entities(names)
    assert places["sub-01/ses-a"] == BidsEntities("01", "a")
    assert places["sub-02"] == BidsEntities("02")
    assert places["case_01"] == BidsEntities("case01")
    assert places["sub-01"].subject.startswith("01x"), "would stand around the sessions of the other sub-01"
    folders = [place.folder.as_posix().lower() for place in places.values()]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert all(part.split("-", 1)[1].isalnum() and part.isascii() for part in folder.split("/"))


def test_names_of_any_length_have_places_of_their_own() -> None:
    names = ["a" * 260 + "1", "a" * 260 + "2", "sub-" + "b" * 90 + "/ses-" + "c" * 260, "sub-" + "b" * 90 + "/ses-c"]
    places = assign_entities(names)
    assert len({place.folder for place in places.values()}) == len(names)
    assert max(len(place.prefix) for place in places.values()) < 130
    assert places[names[3]] == BidsEntities("b" * 90, "c"), "what fits stays as it is"


def test_what_is_not_ours_is_not_replaced(tmp_path: Path, weights: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_case(data / "a")
    touch(out, "sub-a/ses-1/mine.txt")
    assert run_batch(data, out, weights) == 3
    assert "contains other files" in rows(out)["a"]["message"]
    assert (out / "sub-a" / "ses-1" / "mine.txt").exists()


@pytest.mark.parametrize("described", ['{"DatasetType": "raw"}', "no json", '{"GeneratedBy": [{"Name": "fmriprep"}]}'])
def test_another_dataset_is_no_output_folder(tmp_path: Path, weights: Path, described: str) -> None:
    write_case(tmp_path / "data" / "a")
    write_case(tmp_path / "out" / "b")
    (tmp_path / "out" / "dataset_description.json").write_text(described)
    before = tree(tmp_path)
    for out in (tmp_path / "data", tmp_path / "out"):
        with pytest.raises(UsageError, match="itself a dataset"):
            run_batch(tmp_path / "data", out, weights)
    assert tree(tmp_path) == before


def test_an_output_folder_that_is_none_or_unreadable_is_called_so(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(tmp_path / "data" / "a")
    (tmp_path / "out").touch()
    for out, what in ((tmp_path / "out", "is a file"), (tmp_path / "out" / "below", "is inside a file")):
        with pytest.raises(UsageError, match=what):
            run_batch(tmp_path / "data", out, weights)
    really = Path.read_text

    def read_text(self: Path, *how: Any, **more: Any) -> str:
        if self.parent.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return really(self, *how, **more)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(UsageError, match="Permission denied"):
        run_batch(tmp_path / "data", tmp_path / "secret", weights)


@pytest.mark.slow
def test_the_tree_passes_the_bids_validator(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTAINER_TAG", "isles-ensemble:0.2.0")
    for name in ("sub-1_ses-a", "case 2"):
        write_case(tmp_path / "data" / name)
    write_case(tmp_path / "data" / "sub-3" / "ses-b")
    touch(tmp_path, "data/sub-4/anat/sub-4_dwi.nii.gz")
    extras = ExtraOutputs(report=True, save_probabilities=True, save_member_masks=True)
    assert run_batch(tmp_path / "data", tmp_path / "out", weights, extras=extras) == 3
    assert (tmp_path / "out" / "failed" / "sub-4.json").is_file()
    touch(tmp_path / "out", "superseded/sub-1/report.json")

    def errors() -> set[str]:
        """Codes of what the validator calls an error."""
        command = [Path(sys.executable).with_name("bids-validator-deno"), "--format", "json", tmp_path / "out"]
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "DENO_NO_UPDATE_CHECK": "1",
        }
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        issues = json.loads(done.stdout)["issues"]["issues"]
        return {issue["code"] for issue in issues if issue["severity"] == "error"}

    assert errors() == set()
    (tmp_path / "out" / "sub-case2" / "mask.nii.gz").write_bytes(b"x")
    assert errors(), "the validator must be able to fail"


def test_members_whose_names_have_the_same_letters_do_not_share_a_file(
    tmp_path: Path, stub_ensemble: Callable[..., Ensemble]
) -> None:
    names = ("site_a", "site-a", "siteA", "b", "_", "..-")
    ensemble = stub_ensemble(*(StubMember(name, level=1.2 + number / 5) for number, name in enumerate(names)))
    result, extras = segment_raw(phantom_case(), ensemble, SilentWatcher()), ExtraOutputs(save_member_masks=True)
    place = BidsEntities("1")
    for members in (range(6), range(2)):
        some = replace(result, outcomes=tuple(result.outcomes[number] for number in members))
        write_results(
            tmp_path / "out", tmp_path / "s", place, SegmentedCase(phantom_case(), some, ensemble), extras, {"key": "x"}
        )
        folder = tmp_path / "out" / place.folder
        masks = [path.name.lower() for path in folder.glob("*_desc-*_mask.nii.gz")]
        assert len(set(masks)) == len(members)
        said = {json.loads(path.read_text())["Description"].split()[-1] for path in folder.glob("*_desc-*_mask.json")}
        assert said == {names[number] for number in members}
    assert (tmp_path / "out" / "sub-1" / "sub-1_space-dwi_label-lesion_mask.nii.gz").is_file()


def test_the_comparison_of_trees_notices_a_difference(tmp_path: Path, weights: Path) -> None:
    write_case(tmp_path / "data" / "a")
    for name, options in (("x", {}), ("y", {"config": {"fusion": "mean"}})):
        run_batch(tmp_path / "data", tmp_path / name, weights, report=True, **options)  # type: ignore[arg-type]
    one, other = comparable(tmp_path / "x"), comparable(tmp_path / "y")
    assert {name for name in one if one[name] != other[name]} >= {"sub-a/report.json", "sub-a/report.html"}
