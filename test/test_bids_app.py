"""The program as a BIDS App: its levels, which cases they take, and what describes them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from batch_runs import _load, comparable, rows, run_batch, touch, write_bids
from conftest import REPOSITORY, tree
from deploy.boutiques import descriptor
from ensemble.batch import case_loop, failures, run
from ensemble.batch.bids_filter import read_filter
from ensemble.batch.find import find_cases
from ensemble.batch.selection import CaseSelection, is_in_shard
from ensemble.cli import main
from ensemble.errors import InputRefused, UsageError
from ensemble.options import normalise_bids_app_call, parse_options
from ensemble.outputs.layouts import bids
from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.types import Modality

COMMANDS = ("run", "batch", "bids-app")


@pytest.fixture
def app(tmp_path: Path, weights: Path) -> Callable[..., int]:
    """Calls the program on `tmp_path/data` and `tmp_path/out`, with members that need no weights."""

    def call(level: str, *options: str, first: tuple[str, ...] = ()) -> int:
        common = ["--weights", str(weights), "--device", "cpu", "--trust", "off"]
        with patch.object(run, "load_from_config", partial(_load, diary=None, seconds=0.0)):
            return main([*first, str(tmp_path / "data"), str(tmp_path / "out"), level, *common, *options])

    return call


def done(out: Path) -> set[str]:
    return {path.parent.relative_to(out).as_posix() for path in out.glob("sub-*/**/report.json")}


def test_participants_run_one_by_one_and_the_group_make_what_a_batch_makes(
    tmp_path: Path, weights: Path, app: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, whole = (
        write_bids(tmp_path / "data", {"01": ("a", "b"), "02": ("",), "3": ("",)}),
        tmp_path / "out",
        tmp_path / "w",
    )
    cut = data / "sub-3" / "dwi" / "sub-3_dwi.nii.gz"
    cut.write_bytes(cut.read_bytes()[:3000])
    assert run_batch(data, whole, weights) == 3
    assert app("participant", first=("--participant-label", "01")) == 0
    assert done(out) == {"sub-01/ses-a", "sub-01/ses-b"}
    assert not (out / "summary.csv").exists()
    assert f"{out} group" in capsys.readouterr().out
    assert app("group") == 3
    assert {case: row["status"] for case, row in rows(out).items()} == {
        "sub-01/ses-a": "done", "sub-01/ses-b": "done", "sub-02": "not done", "sub-3": "not done"
    }  # fmt: skip
    assert "2 of 4 cases are not done" in capsys.readouterr().err
    assert app("participant", "--participant_label", "sub-02", "3") == 3
    assert "failed: see" in capsys.readouterr().err
    assert app("group") == 3
    assert comparable(out) == comparable(whole)


def test_a_failure_on_record_goes_when_the_case_succeeds(tmp_path: Path, app: Callable[..., int]) -> None:
    data, out = write_bids(tmp_path / "data", {"1": ("",), "2": ("",)}), tmp_path / "out"
    image = data / "sub-2" / "dwi" / "sub-2_dwi.nii.gz"
    whole = image.read_bytes()
    image.write_bytes(b"")
    assert app("participant") == 3
    noted = json.loads((out / "failed" / "sub-2.json").read_text())
    assert (noted["case"], noted["exit_code"]) == ("sub-2", 3)
    assert "the DWI image is an empty file" in noted["message"]
    image.write_bytes(whole)
    assert app("participant", "--participant-label", "2") == 0
    assert not (out / "failed").exists()
    assert app("group") == 0


def test_a_process_killed_behind_a_result_leaves_no_record_of_an_earlier_failure(
    tmp_path: Path, app: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write_bids(tmp_path / "data", {"1": ("",)}), tmp_path / "out"
    image = data / "sub-1" / "dwi" / "sub-1_dwi.nii.gz"
    whole = image.read_bytes()
    image.write_bytes(b"")
    assert app("participant") == 3
    image.write_bytes(whole)
    really = case_loop.write_case

    def killed(*arguments: Any) -> None:
        really(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(case_loop, "write_case", killed)
        app("participant")
    assert done(out) == {"sub-1"}
    assert app("group") == 0
    assert rows(out)["sub-1"]["status"] == "done"


def test_a_failure_is_on_record_although_others_take_the_empty_folder_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, places = failures.write_text_atomically, iter((True, False))

    def beside_another(path: Path, *rest: Any) -> None:
        if next(places):
            path.parent.rmdir()
        really(path, *rest)

    monkeypatch.setattr(failures, "write_text_atomically", beside_another)
    place = BidsEntities("1", "")
    failures.record_failure(tmp_path, tmp_path, place, "sub-1", {"message": "why", "exit_code": 3})
    assert failures.read_failures(tmp_path, [("sub-1", place)]) == {"sub-1": {"message": "why", "exit_code": 3}}


def test_labels_that_are_not_there_are_named(
    tmp_path: Path, app: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    write_bids(tmp_path / "data", {"01": ("a",), "02": ("b",)})
    for options, said in (
        (("--participant-label", "1"), "no participant 1 found: 01, 02"),
        (("--participant-label", "01", "03"), "no participant 03"),
        (("--session-label", "c"), "no session c"),
        (("--participant-label", "01", "--session-label", "b"), "the selected participants have no session b"),
    ):
        assert app("participant", *options) == 3
        errors = capsys.readouterr().err
        assert said in errors.replace(f"where: {tmp_path / 'data'} ", "")
    assert not (tmp_path / "out").exists()
    assert app("participant", "--session-label", "ses-b") == 0
    assert done(tmp_path / "out") == {"sub-02/ses-b"}


@pytest.mark.parametrize(
    ("content", "found"),
    [(None, "no dataset_description.json"), ("{", "Expecting"), ("[]", "no Name"), ('{"Name": "x"}', "no BIDSVersion"),
     ('{"Name": "x", "BIDSVersion": "1.9.0", "DatasetType": "derivative"}', "DatasetType derivative")],
)  # fmt: skip
def test_what_is_no_raw_bids_dataset_is_refused_unless_asked_for(
    tmp_path: Path, app: Callable[..., int], capsys: pytest.CaptureFixture[str], content: str | None, found: str
) -> None:
    described = write_bids(tmp_path / "data", {"1": ("",)}) / "dataset_description.json"
    described.unlink() if content is None else described.write_text(content)
    assert app("participant") == 3
    errors = capsys.readouterr().err
    assert found in errors
    assert "--skip-bids-validation" in errors
    assert app("participant", "--skip-bids-validation") == 0


def test_temporary_files_lie_in_the_work_folder(
    tmp_path: Path, app: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    write_bids(tmp_path / "data", {"1": ("",)})
    touch(tmp_path, "file")
    assert app("participant", "--work-dir", str(tmp_path / "file")) == 2
    assert "can't be written" in capsys.readouterr().err
    assert app("participant", "--work-dir", str(tmp_path / "work" / "x")) == 0
    assert tempfile.gettempdir() == str(tmp_path / "work" / "x")


def test_group_says_where_results_were_made_in_several_ways(
    tmp_path: Path, app: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """As when only some shares ran again with other options: each result is complete, and nothing else tells."""
    write_bids(tmp_path / "data", {"1": ("",), "2": ("",)})
    for label, tta, said in (("1", "none", False), ("2", "mirror", True), ("1", "mirror", False)):
        assert app("participant", "--participant-label", label, "--tta", tta) == 0
        capsys.readouterr()
        assert app("group") == (0 if (tmp_path / "out" / "sub-2").exists() else 3)
        shown = capsys.readouterr()
        assert ("the results were made in 2 ways" in shown.out + shown.err) == said


def test_group_reads_each_report_once_and_looks_for_no_failure_that_is_not_there(
    tmp_path: Path, app: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the file system of a cluster each look costs a way to its server."""
    data = write_bids(tmp_path / "data", {"1": ("",), "2": ("a", "b"), "3": ("",)})
    cut = data / "sub-3" / "dwi" / "sub-3_dwi.nii.gz"
    cut.write_bytes(cut.read_bytes()[:3000])
    assert app("participant") == 3
    opened = []
    for module in (bids, failures):
        read = module.read_json
        monkeypatch.setattr(module, "read_json", lambda path, read=read: opened.append(path) or read(path))
    assert app("group") == 3
    out = tmp_path / "out"
    assert [path for path in opened if path.parent.name == "failed"] == [out / "failed" / "sub-3.json"]
    reports = [path for path in opened if path.name == "report.json"]
    assert len(reports) == len(set(reports)) == 4


def test_group_writes_nothing_on_a_dry_run(
    tmp_path: Path, app: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    write_bids(tmp_path / "data", {"1": ("",)})
    assert app("group", "--dry-run") == 2
    assert "--dry-run has no effect on the level group" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_levels_are_found_anywhere_and_commands_stay_commands() -> None:
    app = ["bids-app", "/b", "/o", "participant"]
    for given, seen in (
        (["/b", "/o", "participant", "--tta", "none"], [*app, "--tta", "none"]),
        (["--participant-label", "01", "02", "/b", "/o", "participant"], [*app, "--participant-label", "01", "02"]),
        (["--verbose", "/b", "/o", "participant"], [*app, "--verbose"]),
    ):
        assert normalise_bids_app_call(given, COMMANDS) == seen
    for given in (
        ["batch", "data", "participant"],
        ["--verbose", "batch", "data", "group"],
        ["run", "--dwi", "x", "--members", "a", "--out", "group"],
        ["--members", "group"],
        ["--input", "in", "--members", "group"],
        [],
    ):
        assert normalise_bids_app_call(given, COMMANDS) == given


def test_labels_are_read_from_the_environment() -> None:
    options = parse_options(["/b", "/o", "participant"], {"ISLES_PARTICIPANT_LABEL": "01,02", "ISLES_SHARD": "2/3"})
    assert (options.participant_label, options.shard) == (["01", "02"], (2, 3))
    with pytest.raises(UsageError, match="ISLES_PARTICIPANT_LABEL is not valid"):
        parse_options(["/b", "/o", "participant"], {"ISLES_PARTICIPANT_LABEL": " , "})  # labels of nobody: not all
    for text in ("0/3", "4/3", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(UsageError):
            parse_options(["batch", "a", "b", "--shard", text], {})


def test_a_filter_file_chooses_images(tmp_path: Path) -> None:
    touch(
        tmp_path / "data",
        *(f"sub-1/dwi/sub-1_{acq}_dwi.nii.gz" for acq in ("acq-a_run-01", "acq-a_run-02", "acq-b", "acq-b_space-x")),
        "sub-1/dwi/sub-1_adc.nii.gz",
    )

    def taken(content: object) -> str:
        (tmp_path / "filter.json").write_text(json.dumps(content))
        (case,) = find_cases(tmp_path / "data", tmp_path / "out", read_filter(tmp_path / "filter.json"))
        return case.files[Modality.DWI].name if case.problem is None else case.problem.what

    assert taken({"dwi": {"acquisition": "a", "run": 1}}) == "sub-1_acq-a_run-01_dwi.nii.gz"
    assert taken({"DWI": {"acq": ["x", "a"], "run": "2"}, "t1w": {"session": "1"}}) == "sub-1_acq-a_run-02_dwi.nii.gz"
    assert taken({"dwi": {"run": None, "space": "Query.NONE"}}) == "sub-1_acq-b_dwi.nii.gz"
    assert (
        taken({"dwi": {"space": "Query.ANY", "suffix": "dwi", "datatype": "dwi"}}) == "sub-1_acq-b_space-x_dwi.nii.gz"
    )
    assert taken({"adc": {}}) == "there is more than one DWI image"
    assert taken({"dwi": {"acquisition": "c"}}) == "there is no DWI image"
    with pytest.raises(InputRefused, match="contains no case"):
        taken({"dwi": {"acquisition": "c"}, "adc": {"session": "1"}})
    for wrong in ([], {"dwi": "a"}, {"t1w": {}}, {"dwi": {"aquisition": "a"}}):
        with pytest.raises(UsageError, match="filter file"):
            taken(wrong)
    with pytest.raises(UsageError, match="can't be read"):
        read_filter(tmp_path / "none.json")


def test_a_filter_is_not_passed_over_where_it_filters_nothing(
    tmp_path: Path, app: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").write_text("case,dwi,adc\n1,dwi.nii.gz,adc.nii.gz\n")
    (tmp_path / "filter.json").write_text('{"dwi": {"session": "a"}}')
    assert app("participant", "--skip-bids-validation", "--bids-filter-file", str(tmp_path / "filter.json")) == 2
    assert "--bids-filter-file has no effect on a worklist" in capsys.readouterr().err


def test_what_is_filtered_out_whole_is_no_failed_case(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ensemble")
    touch(
        tmp_path / "data",
        *(f"sub-{n}/ses-{s}/dwi/sub-{n}_ses-{s}_{what}.nii.gz" for n in "12" for s in "ab" for what in ("dwi", "adc")),
    )
    session = {"session": "a"}
    (tmp_path / "filter.json").write_text(json.dumps({"dwi": session, "adc": session}))
    cases = find_cases(tmp_path / "data", tmp_path / "out", read_filter(tmp_path / "filter.json"))
    assert [(case.name, case.problem) for case in cases] == [("sub-1/ses-a", None), ("sub-2/ses-a", None)]
    assert "the BIDS filter excluded 4 images" in caplog.text


def test_shares_are_a_partition_that_joining_cases_do_not_move() -> None:
    names = [f"sub-{number}" for number in range(200)]
    shares = [{name for name in names if is_in_shard(name, number, 7)} for number in range(1, 8)]
    assert sum(map(len, shares)) == len(set.union(*shares)) == 200
    assert min(map(len, shares)) > 10
    assert [is_in_shard("sub-01/ses-a", number, 3) for number in (1, 2, 3)] == [False, True, False], (
        "and none of other versions"
    )


def test_shares_and_a_group_make_what_a_batch_makes(tmp_path: Path, weights: Path) -> None:
    data, out = write_bids(tmp_path / "data", {str(number): ("",) for number in range(5)}), tmp_path / "out"
    (data / "sub-9").mkdir()
    assert run_batch(data, tmp_path / "whole", weights) == 3
    codes = [
        run_batch(run.BatchCases(data, CaseSelection(shard=(number, 3))), out, weights, summarise=False)
        for number in (3, 1, 2)
    ]
    assert sorted(codes) == [0, 0, 3]
    assert run.write_group_summary(run.BatchCases(data), out) == 3
    assert comparable(out) == comparable(tmp_path / "whole")


def test_the_description_names_the_container(
    tmp_path: Path, app: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bids(tmp_path / "data", {"1": ("",)})
    for variables, said in (
        ({}, None),
        ({"CONTAINER_TAG": "isles-ensemble:0.2.0"}, {"Type": "docker", "Tag": "isles-ensemble:0.2.0"}),
        (
            {"CONTAINER_TAG": "x:1", "APPTAINER_CONTAINER": "/i/x.sif"},
            {"Type": "apptainer", "Tag": "x:1", "URI": "file:///i/x.sif"},
        ),
    ):
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        assert app("participant") == 0
        (maker,) = json.loads((tmp_path / "out" / "dataset_description.json").read_text())["GeneratedBy"]
        assert maker.get("Container") == said
    assert "ENV CONTAINER_TAG" in (REPOSITORY / "Dockerfile").read_text()
    assert tree(tmp_path / "data").keys() >= {"dataset_description.json"}


def test_the_boutiques_descriptor_is_that_of_the_options() -> None:
    assert json.loads((REPOSITORY / "deploy" / "boutiques.json").read_text()) == descriptor(), (
        "python -m deploy.boutiques"
    )


def test_boutiques_takes_the_descriptor_and_makes_a_call_of_it(tmp_path: Path) -> None:
    bosh = Path(sys.executable).with_name("bosh")
    if not bosh.exists():
        pytest.skip("boutiques is not installed")
    inputs = {
        "dataset": "/b",
        "out": "/o",
        "level": "participant",
        "participant_label": ["01", "02"],
        "no_resume": True,
        "tta": "none",
    }
    (tmp_path / "call.json").write_text(json.dumps(inputs))
    described = str(REPOSITORY / "deploy" / "boutiques.json")
    for command in (["validate", described], ["exec", "simulate", "-i", str(tmp_path / "call.json"), described]):
        answer = subprocess.run(
            [sys.executable, bosh, *command], capture_output=True, text=True, check=True, cwd=tmp_path
        ).stdout
    words = answer.split("process.py ")[1].split()
    options = parse_options(words, {})
    assert (options.command, options.dataset, options.level) == ("bids-app", Path("/b"), "participant")
    assert (options.participant_label, options.resume, options.tta) == (["01", "02"], False, "none")
