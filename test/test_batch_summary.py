"""What the summary says of results whose reports are of another version: as much as they hold, and no less of the others."""

from __future__ import annotations

import copy
import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import batch_runs
from batch_runs import run_batch, write_case
from conftest import StubMember, phantom_case, tree
from ensemble.batch import run
from ensemble.batch.parquet import to_parquet
from ensemble.batch.summary import EARLIER, GONE, SummaryRow, collect_summary, write_summary
from ensemble.cli import main
from ensemble.config import ExtraOutputs
from ensemble.errors import UsageError
from ensemble.evaluate.pairs import find_pairs
from ensemble.outputs.artifacts import SegmentedCase
from ensemble.outputs.layouts.bids import write_case as write_results
from ensemble.outputs.layouts.bids_entities import BidsEntities
from ensemble.outputs.report.run_report import SCHEMA, build_report
from ensemble.pipeline import Ensemble, segment_raw
from ensemble.progress import SilentWatcher

PLACE = BidsEntities("a")
MISSING = object()
#: What a field may hold that is of another version, or was edited by hand.
ODD = (MISSING, None, "text", 5, True, [], [None, 3], {}, {"x": "y"}, float("nan"), float("inf"), 10**400, -1)
#: Of the fields that a summary reads, the way there.
READ = (
    "case",
    "case.name",
    "case.files",
    "case.files.dwi",
    "lesion",
    "lesion.volume_ml",
    "lesion.count",
    "agreement",
    "fusion",
)
READ += (
    "fusion.voters",
    "repairs",
    "seconds",
    "seconds.prepare",
    "batch.key",
    "batch.inputs",
    "schema",
    "members",
    "tool",
)


@pytest.fixture
def done(tmp_path: Path, stub_ensemble: Callable[..., Ensemble]) -> Path:
    """A tree with one result; its report."""
    raw, ensemble = phantom_case(), stub_ensemble(StubMember("one"), StubMember("two"))
    case = SegmentedCase(raw, segment_raw(raw, ensemble, SilentWatcher()), ensemble)
    write_results(tmp_path / "out", tmp_path / "scratch", PLACE, case, ExtraOutputs(), {"key": "x"})
    return tmp_path / "out" / PLACE.folder / "report.json"


def altered(report: dict[str, Any], field: str, value: object) -> dict[str, Any]:
    report = copy.deepcopy(report)
    *outer, last = field.split(".")
    holder = report
    for name in outer:
        holder = holder[name]
    if value is MISSING:
        holder.pop(last, None)
    else:
        holder[last] = value
    return report


def summarised(root: Path, places: dict[str, BidsEntities]) -> SummaryRow:
    """The one row, after the table was written and read."""
    (row,) = collect_summary(root, places, {}).rows
    write_summary(root, root, [row])
    with (root / "summary.csv").open(newline="") as file:
        (read,) = csv.DictReader(file)
    assert read == {name: "" if value is None else str(value) for name, value in asdict(row).items()}
    assert "a</a>" in (root / "index.html").read_text() or row.case != "a"
    return row


@pytest.mark.slow
@pytest.mark.parametrize("field", READ)
def test_a_field_that_is_missing_or_of_another_kind_costs_only_itself(done: Path, field: str) -> None:
    whole = json.loads(done.read_text())
    root, full = done.parent.parent, summarised(done.parent.parent, {"a": PLACE})
    for value in ODD:
        done.write_text(json.dumps(altered(whole, field, value)))
        row = summarised(root, {"a": PLACE})
        assert (row.case, row.status, row.mask) == ("a", EARLIER, "sub-a/sub-a_space-dwi_label-lesion_mask.nii.gz")
        for column, of in (
            ("volume_ml", "lesion"),
            ("lesions", "lesion"),
            ("agreement", "agreement"),
            ("voters", "fusion"),
        ):
            if not field.startswith(of):
                assert getattr(row, column) == getattr(full, column) not in (None, "")
        assert summarised(root, {}).status == GONE
        find_pairs(root, root)


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "null", "{}", '{"batch": []}', '{"batch": {"outputs": []}}', "[" * 9000]
)
def test_a_report_that_is_none_is_no_result(done: Path, text: str) -> None:
    done.write_text(text)
    assert collect_summary(done.parent.parent, {"a": PLACE}, {}).rows == [SummaryRow("a", "a", "", "not done")]
    assert collect_summary(done.parent.parent, {}, {}).rows == []


def test_a_result_without_key_is_made_anew_and_one_without_fields_is_kept(tmp_path: Path, weights: Path) -> None:
    write_case(tmp_path / "data" / "a")
    assert run_batch(tmp_path / "data", tmp_path / "out", weights) == 0
    path = tmp_path / "out" / "sub-a" / "report.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({"batch": whole["batch"]}))
    before = tree(tmp_path / "out" / "sub-a")
    assert run_batch(tmp_path / "data", tmp_path / "out", weights) == 0
    assert tree(tmp_path / "out" / "sub-a") == before
    row = batch_runs.rows(tmp_path / "out")["a"]
    assert (row["status"], row["lesions"], row["seconds"]) == ("done", "", "")
    path.write_text(json.dumps(altered(whole, "batch.key", MISSING)))
    assert run_batch(tmp_path / "data", tmp_path / "out", weights) == 0
    assert json.loads(path.read_text())["batch"]["key"] == whole["batch"]["key"]


def test_parquet_holds_what_the_table_holds_with_types(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet_file = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (requirements-dev.txt)")
    data, out = tmp_path / "data", tmp_path / "out"
    write_case(data / "a")
    write_case(data / "=b")
    (data / "c").mkdir()
    monkeypatch.setattr(run, "load_from_config", partial(batch_runs._load, diary=None, seconds=0.0))
    command = ["batch", str(data), str(out), "--weights", str(weights), "--device", "cpu", "--trust", "off"]
    assert main([*command, "--parquet"]) == 3
    assert f"  {out / 'summary.parquet'}" in capsys.readouterr().out.splitlines()
    table = parquet_file.read_table(out / "summary.parquet")
    kinds = {"lesions": "int64", **dict.fromkeys(("volume_ml", "agreement", "seconds", "expected_dice"), "double")}
    assert table.column_names == list(SummaryRow.__dataclass_fields__)
    assert {name: str(table.schema.field(name).type) for name in kinds} == kinds
    read = {row["case"]: row for row in table.to_pylist()}
    for row in batch_runs.rows(out).values():
        cells = read.pop(row["case"].removeprefix("'"))  # which keeps spreadsheets from taking it for a formula
        said = {name: "" if value is None else str(value) for name, value in cells.items()}
        assert said == {name: value.removeprefix("'") for name, value in row.items()}
        assert None not in (cells["status"], cells["volume_ml"] if cells["status"] == "done" else "")
    assert not read
    before = (out / "summary.parquet").read_bytes()
    assert main([*command[:3], "--skip-bids-validation", "group"]) == 2  # no such command, and nothing is written
    assert main([str(data), str(out), "group", "--skip-bids-validation"]) == 3
    assert "summary.parquet is of an earlier call: --parquet writes it anew" in capsys.readouterr().out
    assert main([str(data), str(out), "group", "--skip-bids-validation", "--parquet"]) == 3
    assert (out / "summary.parquet").read_bytes() == before


def test_parquet_holds_integers_of_any_size_as_unknown() -> None:
    parquet_file = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (requirements-dev.txt)")
    rows = [
        SummaryRow("a", "a", "", "done", lesions=10**400, voters="x\udcff"),
        SummaryRow("b", "b", "", "not done", lesions=-(2**62)),
    ]
    table = parquet_file.read_table(io.BytesIO(to_parquet(rows)))
    assert table["lesions"].to_pylist() == [None, -(2**62)]
    assert table["voters"].to_pylist() == ["x\ufffd", None]
    assert parquet_file.read_table(io.BytesIO(to_parquet([]))).schema == table.schema


def test_parquet_without_pyarrow_is_refused_before_any_work(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(tmp_path / "data" / "a")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    for summarise in (
        lambda: run_batch(tmp_path / "data", tmp_path / "out", weights, parquet=True),
        lambda: run.write_group_summary(run.BatchCases(tmp_path / "data"), tmp_path / "out", parquet=True),
    ):
        with pytest.raises(UsageError, match="--parquet needs pyarrow") as raised:
            summarise()
        assert "pip install pyarrow" in raised.value.do
    assert not (tmp_path / "out").exists()


def test_a_report_says_its_version_first(stub_ensemble: Callable[..., Ensemble]) -> None:
    raw, ensemble = phantom_case(), stub_ensemble(StubMember("one"))
    report = build_report(raw, segment_raw(raw, ensemble, SilentWatcher()), ensemble)
    assert next(iter(report.items())) == ("schema", SCHEMA)
