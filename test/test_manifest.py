"""Which members a weights folder holds, and whether they are unaltered."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ensemble.config import SHIPPED_WEIGHTS, RunConfig
from ensemble.errors import UsageError, WeightsBroken
from ensemble.families.base import InferenceSettings
from ensemble.families.spec import MemberSpec
from ensemble.files import file_sha256
from ensemble.members.manifest import (
    apply_member_defaults,
    find_members,
    open_member,
    verify_files,
    weight_digests,
)
from ensemble.weights import digests
from nnunet_folders import build_folder


def write_manifest(folder: Path, *entries: dict[str, Any]) -> Path:
    (folder / "manifest.json").write_text(json.dumps({"members": list(entries)}))
    return folder


ENTRY = {"name": "a", "kind": "nnunet", "folder": "a"}


def test_entries_are_read(tmp_path: Path) -> None:
    full = ENTRY | {
        "name": "b",
        "channels": ["DWI", "ADC"],
        "intensities": "tissue_normalized",
        "orientation": "canonical",
        "spacing_mm": [2, 2, 2],
        "licence": "Apache-2.0",
        "sha256": {"plans.json": "00"},
    }
    plain, whole = find_members(write_manifest(tmp_path, ENTRY, full))
    assert plain == MemberSpec("a", "nnunet", tmp_path / "a")
    assert whole == MemberSpec(
        "b",
        "nnunet",
        tmp_path / "a",
        ("DWI", "ADC"),
        "tissue_normalized",
        "canonical",
        (2.0, 2.0, 2.0),
        "Apache-2.0",
        {"plans.json": "00"},
    )


def test_the_former_word_for_intensities_is_still_read(tmp_path: Path) -> None:
    (spec,) = find_members(write_manifest(tmp_path, ENTRY | {"intensities": "physical"}))
    assert spec.intensities == "tissue_normalized"
    assert spec.as_json()["intensities"] == "tissue_normalized"


def test_members_are_chosen_by_name(tmp_path: Path) -> None:
    write_manifest(tmp_path, ENTRY, ENTRY | {"name": "b"})
    assert [spec.name for spec in find_members(tmp_path, ("b", "a"))] == ["b", "a"]
    with pytest.raises(UsageError, match="no member is named c"):
        find_members(tmp_path, ("a", "c"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"members": 3}',
        '{"members": [{"name": "a"}]}',
        '{"members": [{"name": "a", "kind": "nnunet", "folder": "a", "intensities": "loud"}]}',
    ],
)
def test_a_broken_manifest_is_broken_weights(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(WeightsBroken, match="manifest") as error:
        find_members(tmp_path)
    assert error.value.exit_code == 4


def test_folders_without_a_manifest_are_recognised_by_their_layout(tmp_path: Path) -> None:
    for name in ("x/Dataset1/trainer__plans__3d_fullres", "y"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("plans.json", "dataset.json"):
            (tmp_path / name / file).write_text("{}")
    specs = find_members(tmp_path)
    assert [(spec.name, spec.intensities) for spec in specs] == [
        ("x__Dataset1__trainer__plans__3d_fullres", "native"),
        ("y", "native"),
    ]
    assert [spec.name for spec in find_members(tmp_path / "y")] == ["y"]


def test_no_folder_and_no_member(tmp_path: Path) -> None:
    with pytest.raises(WeightsBroken, match="does not exist"):
        find_members(tmp_path / "none")
    (tmp_path / "readme.txt").touch()
    with pytest.raises(WeightsBroken, match="the weights folder has no recognised member") as error:
        find_members(tmp_path)
    assert "readme.txt" in error.value.found


def test_files_that_were_altered_or_lost_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"weights")
    spec = MemberSpec("a", "nnunet", tmp_path, sha256={"w": hashlib.sha256(b"weights").hexdigest()})
    verify_files(spec)
    (tmp_path / "w").write_bytes(b"Weights")
    for listed, holder in ((True, "digest in manifest.json"), (False, "digest in the member's member.json")):
        with pytest.raises(WeightsBroken, match="does not match its recorded SHA-256") as altered:
            verify_files(replace(spec, listed=listed))
        assert holder in altered.value.do
    (tmp_path / "w").unlink()
    with pytest.raises(WeightsBroken, match="is missing"):
        open_member(spec, InferenceSettings())


def test_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(WeightsBroken, match="unknown kind 'oracle'") as refused:
        open_member(MemberSpec("a", "oracle", tmp_path), InferenceSettings())
    assert "in manifest.json, or a packed member's member.json" in refused.value.do


def test_digests_of_files_of_unknown_origin_are_computed(tmp_path: Path) -> None:
    (tmp_path / "plans.json").write_bytes(b"{}")
    (tmp_path / "progress.png").write_bytes(b"a picture")
    assert weight_digests(MemberSpec("a", "nnunet", tmp_path)) == {"plans.json": hashlib.sha256(b"{}").hexdigest()}


def test_the_shipped_members_are_complete_and_unaltered() -> None:
    specs = find_members(SHIPPED_WEIGHTS)
    assert len(specs) == 3
    for spec in specs:
        assert {"dataset.json", "plans.json", "fold_0/checkpoint_final.pth"} <= set(spec.sha256)
        assert spec.licence
        assert (spec.folder / "README.md").is_file()
        verify_files(spec)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsBroken, match="manifest") as error:
        find_members(write_manifest(tmp_path, ENTRY, ENTRY))
    assert "same name" in error.value.found


def test_a_fold_that_was_slipped_in_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "fold_0.pth").write_bytes(b"weights")
    spec = MemberSpec("a", "nnunet", tmp_path, sha256={"fold_0.pth": hashlib.sha256(b"weights").hexdigest()})
    (tmp_path / "README.md").write_text("not weights")
    verify_files(spec)
    (tmp_path / "fold_1").mkdir()
    (tmp_path / "fold_1" / "checkpoint_final.pth").write_bytes(b"others")
    with pytest.raises(WeightsBroken, match="does not list") as error:
        verify_files(spec)
    assert error.value.found == "fold_1/checkpoint_final.pth"


def test_shipped_folders_say_themselves_what_they_need(tmp_path: Path) -> None:
    """Without the manifest, networks made for tissue-normalised intensities must not be run on raw ones."""
    for spec in find_members(SHIPPED_WEIGHTS):
        target = tmp_path / spec.name
        target.mkdir()
        for name in ("plans.json", "dataset.json"):
            (target / name).write_bytes((spec.folder / name).read_bytes())
    found = {spec.name: (spec.intensities, spec.orientation) for spec in find_members(tmp_path)}
    assert found == dict.fromkeys(
        (spec.name for spec in find_members(SHIPPED_WEIGHTS)), ("tissue_normalized", "canonical")
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "../../victim",
        "/tmp/x",
        "a\\b",
        "a b",
        "a,b",
        "ü",
        "a\n",
        "a\0b",
        "x" * 101,
        7,
        None,
        ["a"],
    ],
)
def test_a_name_that_is_a_path_or_no_name_is_broken_weights(tmp_path: Path, name: object) -> None:
    """With --save-member-masks it would name a file outside the output folder."""
    with pytest.raises(WeightsBroken, match="manifest") as error:
        find_members(write_manifest(tmp_path, ENTRY | {"name": name}))
    assert error.value.exit_code == 4
    assert "name" in error.value.found
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "member.json").write_text(json.dumps({"name": name, "kind": "nnunet"}))
    with pytest.raises(WeightsBroken, match="packed member"):
        find_members(tmp_path)


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "..a", "mask", "ensemble", "fused", "votes", "CON", "x" * 100])
def test_a_name_is_a_name(tmp_path: Path, name: str) -> None:
    assert [spec.name for spec in find_members(write_manifest(tmp_path, ENTRY | {"name": name}))] == [name]


def test_names_that_differ_by_capitals_only_are_broken_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsBroken) as error:
        find_members(write_manifest(tmp_path, ENTRY, ENTRY | {"name": "A"}))
    assert "same name" in error.value.found


def test_a_folder_outside_the_weights_folder_is_broken_weights(tmp_path: Path) -> None:
    weights, outside = tmp_path / "w", tmp_path / "outside"
    weights.mkdir()
    outside.mkdir()
    (weights / "link").symlink_to(outside)
    for folder in ("../outside", str(outside), "link", "a/../../outside", "..", "../w2"):
        with pytest.raises(WeightsBroken) as error:
            find_members(write_manifest(weights, ENTRY | {"folder": folder}))
        assert "outside the weights folder" in error.value.found
    for folder in ("a", ".", "a/../b", "../w/a"):
        assert len(find_members(write_manifest(weights, ENTRY | {"folder": folder}))) == 1
    (tmp_path / "alias").symlink_to(weights)
    assert len(find_members(tmp_path / "alias")) == 1


def test_folders_that_are_found_get_names_that_are_safe_and_their_own(tmp_path: Path) -> None:
    folders = [
        "site/a",
        "site__a",
        "site_a",
        "B",
        "b",
        "my model",
        "my_model",
        "ü",
        "…",
        "..x",
        "long" * 20 + "/" + "er" * 30,
    ]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        for file in ("plans.json", "dataset.json"):
            (tmp_path / folder / file).write_text("{}")
    found = {spec.folder.relative_to(tmp_path).as_posix(): spec.name for spec in find_members(tmp_path)}
    assert set(found) == set(folders)
    assert len({name.lower() for name in found.values()}) == len(folders)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name) and name not in (".", "..") for name in found.values())
    assert (found["site_a"], found["..x"]) == ("site_a", "..x")
    assert found["site/a"].startswith("site__a")
    assert [spec.name for spec in find_members(tmp_path, (found["b"],))] == [found["b"]]


@pytest.mark.parametrize("channels", [[1, 2], [["DWI"]], "DWI", {"DWI": "ADC"}, 5, [None]])
def test_channels_that_are_no_names_are_broken_weights(tmp_path: Path, channels: object) -> None:
    """Numbers ended in a traceback."""
    entry = {"name": "a", "kind": "nnunet", "folder": "a", "channels": channels}
    (tmp_path / "manifest.json").write_text(json.dumps({"members": [entry]}))
    with pytest.raises(WeightsBroken, match="manifest can't be read") as broken:
        find_members(tmp_path)
    assert "channels" in broken.value.found


def test_an_entry_says_what_a_vote_counts_and_what_is_too_small(tmp_path: Path) -> None:
    entries = [ENTRY | {"weight": 2, "min_lesion_ml": 0.05}, ENTRY | {"name": "b", "min_lesion_ml": 0.1}]
    specs = find_members(write_manifest(tmp_path, *entries))
    assert [(spec.weight, spec.min_lesion_ml) for spec in specs] == [(2.0, 0.05), (1.0, 0.1)]
    assert MemberSpec.from_json(specs[0].as_json(), specs[0].folder) == specs[0]  # packed members keep it
    assert not {"weight", "min_lesion_ml"} & set(MemberSpec("c", "nnunet", tmp_path).as_json())
    rule = apply_member_defaults(RunConfig(), specs)
    assert (rule.member_weights, rule.min_lesion_ml) == ({"a": 2.0, "b": 1.0}, 0.05)
    stated = apply_member_defaults(RunConfig(member_weights={"b": 3.0}, min_lesion_ml=0.0), specs)
    assert (stated.member_weights, stated.min_lesion_ml) == ({"b": 3.0}, None)
    assert (rule.min_disputed_ml, stated.min_disputed_ml) == (0.1, 0.1)
    with pytest.raises(UsageError, match="names c"):
        apply_member_defaults(RunConfig(member_weights={"c": 3.0}), specs)


def test_an_entry_says_below_which_volume_disputed_lesions_are_removed(tmp_path: Path) -> None:
    entries = [ENTRY | {"min_disputed_ml": 2}, ENTRY | {"name": "b", "min_disputed_ml": 3.0}, ENTRY | {"name": "c"}]
    specs = find_members(write_manifest(tmp_path, *entries))
    assert MemberSpec.from_json(specs[0].as_json(), specs[0].folder) == specs[0]
    assert apply_member_defaults(RunConfig(), specs[:2]).min_disputed_ml == 2.0
    assert apply_member_defaults(RunConfig(), specs).min_disputed_ml == 0.1  # c comes from elsewhere
    assert apply_member_defaults(RunConfig(min_disputed_ml=0.0), specs).min_disputed_ml == 0.0


def test_entries_that_say_nothing_of_votes_are_the_usual_rule() -> None:
    specs = tuple(MemberSpec(name, "nnunet", Path("/nowhere")) for name in "ab")
    assert apply_member_defaults(RunConfig(), specs) == RunConfig(min_disputed_ml=0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", 0),
        ("weight", -1),
        ("weight", "2"),
        ("weight", float("inf")),
        ("weight", True),
        ("weight", float("nan")),
        ("min_lesion_ml", -0.1),
        ("min_lesion_ml", None),
        ("min_lesion_ml", float("nan")),
        ("min_disputed_ml", -1),
    ],
)
def test_votes_that_make_no_sense_are_broken_weights(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(WeightsBroken, match="manifest"):
        find_members(write_manifest(tmp_path, ENTRY | {key: value}))


def test_digests_of_files_that_stay_as_they_are_are_computed_once(tmp_path: Path, monkeypatch) -> None:
    spec = find_members(build_folder(tmp_path).parent)[0]
    counted: list[Path] = []
    monkeypatch.setattr(digests, "file_sha256", lambda path: (counted.append(path), file_sha256(path))[1])
    first = weight_digests(spec)
    files = len(counted)
    assert weight_digests(spec) == first
    assert len(counted) == files > 0
    path = next(spec.folder.rglob("*.pth"))
    content, before = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size, and dated back
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weight_digests(spec) != first
    assert len(counted) == files + 1
