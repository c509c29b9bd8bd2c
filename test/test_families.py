"""A family is one file and one row: found, listed, checked, packed and voting; and weights folders that can't be read."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from conftest import phantom_arrays, phantom_case, phantom_lesion, tree, write_image
from ensemble.cli import main
from ensemble.config import RunConfig, files_below
from ensemble.errors import WeightsBroken
from ensemble.families import registry
from ensemble.families.base import InferenceSettings
from ensemble.members.listing import describe_member
from ensemble.members.manifest import find_members, find_unsupported, open_member, weight_digests
from ensemble.members.pack import pack_members
from ensemble.metrics import dice
from ensemble.pipeline import load_from_config, segment_raw
from ensemble.progress import SilentWatcher
from example_family import FILE, Threshold, Unpackable, write_threshold
from nnunet_folders import build_folder
from nnunet_v1_folders import PUBLISHED, V1Spec, build_v1_folder

ARGUMENTS = ("--device", "cpu", "--weights")


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, Threshold()))


@pytest.mark.usefixtures("row")
def test_the_example_is_found_listed_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_threshold(tmp_path / "site" / "mine")
    (spec,) = find_members(tmp_path)
    assert (spec.name, spec.kind, spec.folder) == ("site__mine", "threshold", tmp_path / "site" / "mine")
    assert main(["members", "list", *ARGUMENTS, str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split()[:6] == ["site__mine", "threshold", "all", "DWI", "1x1x1", "mm"]
    assert main(["members", "check", *ARGUMENTS, str(tmp_path)]) == 0
    assert "site__mine: ok" in capsys.readouterr().out
    (spec.folder / FILE).write_text('{"level": null}')
    assert main(["members", "check", *ARGUMENTS, str(tmp_path)]) == 4
    assert "site__mine: broken\n  no level" in capsys.readouterr().out


@pytest.mark.usefixtures("row")
def test_the_example_is_packed_and_named_by_a_manifest(tmp_path: Path) -> None:
    folder = write_threshold(tmp_path / "a" / "mine")
    pack_members(folder, tmp_path / "b", "fp32")
    (spec,) = find_members(tmp_path / "b")
    assert set(spec.sha256) == {FILE}
    open_member(spec, InferenceSettings())
    (tmp_path / "b" / FILE).write_text(json.dumps({"level": 9}))
    with pytest.raises(WeightsBroken, match="does not match its recorded SHA-256"):
        open_member(spec, InferenceSettings())
    entry = {"name": "x", "kind": "threshold", "folder": "mine"}
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({"members": [entry]}))
    assert [spec.name for spec in find_members(tmp_path / "a")] == ["x"]


def test_a_kind_without_a_packed_form_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", (Unpackable(),))
    write_threshold(tmp_path / "a")
    before = tree(tmp_path)
    assert main(["members", "pack", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("row")
def test_the_example_votes_beside_another_family(tmp_path: Path) -> None:
    write_threshold(tmp_path / "weights" / "low", 1.4)
    write_threshold(tmp_path / "weights" / "high", 1.6)
    result = segment_raw(
        phantom_case(), load_from_config(RunConfig(weights=tmp_path / "weights", device="cpu")), SilentWatcher()
    )
    assert [(outcome.member, outcome.status) for outcome in result.outcomes] == [("high", "voted"), ("low", "voted")]
    assert dice(phantom_lesion(), result.fused.mask.array) > 0.98
    build_folder(tmp_path / "weights")
    assert {spec.kind for spec in find_members(tmp_path / "weights")} == {"threshold", "nnunet"}


def test_what_is_not_recognised_is_told_by_every_family(tmp_path: Path, row: None) -> None:
    with pytest.raises(WeightsBroken, match="no recognised member") as error:
        find_members(tmp_path)
    assert all(family.layout in error.value.do for family in registry.FAMILIES)


def test_every_family_has_words_of_its_own() -> None:
    assert len({family.kind for family in registry.FAMILIES}) == len(registry.FAMILIES)
    assert len({family.layout for family in registry.FAMILIES}) == len(registry.FAMILIES)
    assert all(suffix.startswith(".") for suffix in registry.weight_suffixes())


def test_a_single_fold_is_no_member(tmp_path: Path) -> None:
    folder = build_v1_folder(tmp_path / PUBLISHED, V1Spec(folds=("fold_0",)))
    with pytest.raises(WeightsBroken, match="no recognised member"):
        find_members(folder / "fold_0")


# --- folders that can't be read --------------------------------------------------------------------------------------------------------


def forbid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a folder were another user's; root may read everything."""
    really = os.scandir

    def scan(path: str | int) -> object:
        if str(path) == str(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", scan)


@pytest.mark.parametrize("manifest", [False, True], ids=["by layout", "by manifest"])
@pytest.mark.parametrize("kind", ["nnunet", "seals"])
@pytest.mark.parametrize("action", ["list", "check", "pack", "run"])
def test_a_fold_that_cannot_be_read_is_broken_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    action: str,
    kind: str,
    manifest: bool,
) -> None:
    """A member would vote without it."""
    weights = tmp_path / "w"
    if kind == "nnunet":
        folder = build_folder(weights)
        (folder / "fold_1").mkdir()
    else:
        folder = build_v1_folder(weights / "v1", V1Spec(folds=("fold_0", "fold_1")))
    if manifest:
        entry = {"name": "a", "kind": kind, "folder": folder.relative_to(weights).as_posix()}
        (weights / "manifest.json").write_text(json.dumps({"members": [entry]}))
    forbid(folder / "fold_1", monkeypatch)
    dwi, adc = (write_image(array, tmp_path / f"{modality}.nii.gz") for modality, array in phantom_arrays().items())
    arguments = {
        "list": ["members", "list", *ARGUMENTS, str(weights)],
        "check": ["members", "check", *ARGUMENTS, str(weights)],
        "pack": ["members", "pack", str(weights), str(tmp_path / "packed")],
        "run": ["run", f"--dwi={dwi}", f"--adc={adc}", f"--out={tmp_path / 'out'}", *ARGUMENTS, str(weights)],
    }
    assert main(arguments[action]) == 4
    said = capsys.readouterr()
    assert "can't be read" in said.out + said.err
    assert str(folder / "fold_1") in said.out + said.err
    assert not (tmp_path / "packed").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", [".", "a", "a/b"])
def test_a_weights_folder_that_cannot_be_read_is_broken_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "readme.txt").touch()
    forbid(tmp_path / below, monkeypatch)
    for find in (find_members, find_unsupported):
        with pytest.raises(WeightsBroken, match="can't be read") as error:
            find(tmp_path)
        assert error.value.where == str(tmp_path / below)
        assert "Permission denied" in error.value.found
        assert error.value.do


def test_what_the_file_system_and_others_hide_is_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is mounted as weights folder has a `lost+found` that only root may read."""
    build_folder(tmp_path)
    for name in ("lost+found", ".Trash-0"):
        (tmp_path / name).mkdir()
        forbid(tmp_path / name, monkeypatch)
        assert len(find_members(tmp_path)) == 1


def test_hidden_folders_that_can_be_read_are_looked_at(tmp_path: Path) -> None:
    folder = build_folder(tmp_path / ".cache")
    (spec,) = find_members(tmp_path)
    assert spec.folder == folder
    assert not list(files_below(tmp_path))


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    """Folds may be links to folders elsewhere; a link to a folder above ends nothing, and walks no other disk."""
    root, elsewhere = tmp_path / "weights", tmp_path / "store"
    for folder in (root / "a", elsewhere):
        folder.mkdir(parents=True)
        (folder / "x").touch()
    (root / "b").symlink_to(elsewhere)
    (root / "c").symlink_to("a")
    for name, target in {
        "root": root,
        "above": tmp_path,
        "all": Path("/"),
        "a/back": root / "a",
        "self": root / "self",
    }.items():
        (root / name).symlink_to(target)
    (elsewhere / "weights").symlink_to(root)
    found = sorted(path.relative_to(root).as_posix() for path in files_below(root) if path.is_file())
    assert found == ["a/x", "b/x", "c/x"]


@pytest.mark.parametrize("use", [weight_digests, describe_member, lambda spec: open_member(spec, InferenceSettings())])
def test_a_file_that_cannot_be_read_is_broken_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: object
) -> None:
    (spec,) = find_members(build_folder(tmp_path))
    secret = spec.folder / "plans.json"
    really = Path.stat

    def stat(self: Path, **how: bool) -> os.stat_result:
        if self == secret:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return really(self, **how)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(WeightsBroken, match="can't be read") as error:
        use(spec)  # type: ignore[operator]
    assert error.value.where == str(secret)


def test_a_checkpoint_that_cannot_be_opened_is_broken_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (spec,) = find_members(build_folder(tmp_path))
    secret = spec.folder / "fold_0" / "checkpoint_final.pth"
    really = Path.open

    def opened(self: Path, *how: Any, **more: Any) -> Any:
        if self == secret:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return really(self, *how, **more)

    monkeypatch.setattr(Path, "open", opened)
    for use in (weight_digests, lambda spec: open_member(spec, InferenceSettings())):
        with pytest.raises(WeightsBroken, match="can't be read") as error:
            use(spec)
        assert error.value.where == str(secret)
