"""Text from outside never acts: it forges no line of a log, moves no cursor, reorders nothing, and is no formula in a table."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest

from ensemble.batch.case_loop import CaseOutcome
from ensemble.batch.progress import BatchProgress
from ensemble.batch.summary import SummaryRow, write_summary
from ensemble.errors import InputRefused
from ensemble.logging_setup import log_failure, set_up_logging, write_final_error_line
from ensemble.serve.worker import CaseFailed
from ensemble.text import escape_invisible, spreadsheet_cell

#: Escape sequences, line breaks of all kinds, bidirectional overrides, zero widths, a tag, a byte that is no UTF-8.
HOSTILE = "a\x1b[2K\rb\nlesions: 0, 0.000 ml\x85\u2028\u2029\u202e\u2066\u200b\ufeff\x9b\x07\U000e0041\udce9\x00\tz"
UNSEEN = set("\x1b\r\x85\u2028\u2029\u202e\u2066\u200b\ufeff\x9b\x07\U000e0041\udce9\x00\t")


@pytest.fixture(autouse=True)
def _stdout_as_it_was() -> object:
    root, ours = logging.getLogger(), logging.getLogger("ensemble")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before
    logging.captureWarnings(False)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that were printed; nothing in them acts."""
    said = capsys.readouterr()
    text = said.out + said.err
    assert not UNSEEN & set(text), text
    return text.split("\n")


def forged(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("lesions")]


def test_a_folders_name_forges_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    log = logging.getLogger("ensemble.x")
    log.info("note: %s", HOSTILE)
    log.info("in %s: %d, %.2f", Path(HOSTILE.replace("\0", "")), 3, 0.5)
    log.warning("%s", OSError(2, HOSTILE))
    lines = shown(capsys)
    assert len(lines) == 4
    assert not forged(lines)
    assert lines[1].endswith(": 3, 0.50")


def test_an_error_keeps_its_own_lines_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    refused = InputRefused(f"the {HOSTILE} image", where=HOSTILE, found=HOSTILE, do="look")
    log_failure(refused)
    logging.getLogger("ensemble.x").info("%s", CaseFailed.of(refused))
    write_final_error_line(f"error: {refused}")
    BatchProgress(1).tell(CaseOutcome(HOSTILE, "failed", str(refused), 3))
    lines = shown(capsys)
    assert not forged(lines)
    assert [line.split(":")[0] for line in lines if line.startswith("  ")].count("  where") == 2
    assert str(refused).count("\n") == 3


def test_a_traceback_and_what_libraries_say_forge_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        log_failure(error)
    logging.getLogger("pydicom").warning(f"odd value {HOSTILE}")
    logging.getLogger("py.warnings").error("%s", HOSTILE)
    lines = shown(capsys)
    assert not forged(lines)
    assert any("Traceback" in line for line in lines)


def test_the_last_word_is_one_line_that_acts_on_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    write_final_error_line(f"error: {HOSTILE}")
    assert len(shown(capsys)) == 2


@pytest.mark.parametrize(
    "name", ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1", " =1", "\uff1d1", "\u200b=1"]
)
def test_a_name_is_no_formula(tmp_path: Path, name: str) -> None:
    row = SummaryRow(name, name, name, "failed", volume_ml=-0.5, lesions=3, message=name, voters=name)
    write_summary(tmp_path, tmp_path, [row])
    with (tmp_path / "summary.csv").open(encoding="utf-8", newline="") as file:
        (read,) = csv.DictReader(file)
    for column in ("case", "subject", "message", "voters"):
        assert not read[column].lstrip().startswith(tuple("=+-@\t\r\uff1d")), read
    assert (read["volume_ml"], read["lesions"]) == ("-0.5", "3")


def test_a_table_keeps_its_rows(tmp_path: Path) -> None:
    write_summary(tmp_path, tmp_path, [SummaryRow(HOSTILE, "x", "", "failed")])
    text = (tmp_path / "summary.csv").read_bytes().decode()
    assert not UNSEEN & set(text)
    assert text.count("\n") == 2
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not (UNSEEN - {"\t"}) & set(page)


def test_what_can_be_seen_stays_as_it_is() -> None:
    for text in (
        "Müller 東京",
        "a b",
        "17_dwi.nii.gz",
        "5\N{NO-BREAK SPACE}ml",
        "naïve",
        "\N{COMBINING ACUTE ACCENT}e",
    ):
        assert escape_invisible(text) == text
        assert spreadsheet_cell(text) == text
    assert [spreadsheet_cell(value) for value in (-1.5, 3, None, "", "a=b")] == [-1.5, 3, None, "", "a=b"]
