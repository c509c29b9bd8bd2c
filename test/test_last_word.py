"""The platform shows its user the last non-empty line of stderr: on failure, and only then, it says why."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPOSITORY
from ensemble.cli import main
from ensemble.errors import InputRefused
from ensemble.logging_setup import report_failure, suppress_info_messages, write_final_error_line


@pytest.fixture(autouse=True)
def _our_logger() -> Iterator[None]:
    level = logging.getLogger("ensemble").level
    yield
    logging.getLogger("ensemble").setLevel(level)


@pytest.mark.slow
def test_the_last_line_of_stderr_says_what_where_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    command = [
        sys.executable,
        str(REPOSITORY / "process.py"),
        "--input",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path / "in") in line
    assert " do: " in line
    assert "error: " in done.stdout  # the log has it as well


def test_wrong_usage_has_a_last_word_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--adc", "a"]) == 2
    assert "--dwi, --out" in capsys.readouterr().err.splitlines()[-1]


def test_help_and_success_leave_stderr_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["members", "list"]) == 0
    assert capsys.readouterr().err == ""


def test_a_bug_has_its_traceback_in_the_log_and_one_line_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("ensemble.cli._members", broken)
    assert main(["members", "list"]) == 1
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.endswith("RuntimeError: two lines")
    assert "bug" in line
    assert "Traceback" in said.out


def test_text_of_several_lines_and_odd_bytes_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report_failure(InputRefused("what\nis wrong", where="a\udcffb", found="x\r\ny"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: what is wrong where: a\N{REPLACEMENT CHARACTER}b found: x y"


def test_a_closed_stderr_is_no_failure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    write_final_error_line("nobody reads this")


def test_a_batch_with_failed_cases_says_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = tmp_path / "data" / "case-1"
    case.mkdir(parents=True)
    for name in ("dwi", "adc"):
        (case / f"{name}.nii.gz").write_bytes(b"no image")
    assert main(["batch", str(tmp_path / "data"), str(tmp_path / "out"), "--device", "cpu"]) == 3
    assert "1 of 1 cases failed" in capsys.readouterr().err.splitlines()[-1]


def test_notes_on_the_warm_up_phantom_stay_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    ours = logging.getLogger("ensemble")
    ours.setLevel(logging.INFO)
    with suppress_info_messages():
        logging.getLogger("ensemble.pipeline").info("note: something odd")
        logging.getLogger("ensemble.pipeline").warning("a member failed")
    logging.getLogger("ensemble.pipeline").info("note: of a patient")
    assert [record.message for record in caplog.records] == ["a member failed", "note: of a patient"]
    ours.setLevel(logging.DEBUG)
    with suppress_info_messages():
        logging.getLogger("ensemble.pipeline").info("all was asked for")
    assert caplog.records[-1].message == "all was asked for"
